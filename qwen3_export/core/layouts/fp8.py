"""The layout of Qwen3's FP8 releases: E4M3, a scale per 128 × 128.

NAME.weight            E4M3 [out, in]
NAME.weight_scale_inv  bf16 or fp32 [out / 128, in / 128]    codes are multiplied by it, despite its name
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.layouts import NEEDS_ORIGINAL, Schemes, Shapes, Stored, is_unquantized, scale_dtype_of
from qwen3_export.core.layouts.gptq import uniform
from qwen3_export.core.scheme import ACTIVATION_GROUP, QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def supports(scheme: QuantScheme) -> str | None:
    """FP8 in blocks, inputs rounded in groups as the kernels do."""
    if (scheme.type, scheme.num_bits, scheme.strategy) != ("float", 8, "block"):
        return "it holds FP8 weights in blocks only"
    return None if scheme.activations == "dynamic-group" else "its kernels round activations: dynamic-group"


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    return {
        f"{module}.weight": (_E4M3, shape),
        f"{module}.weight_scale_inv": (SCALE_TYPES[scheme.scale_dtype], scheme.grid(shape)),
    }


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    return {f"{tensor.name}.weight": tensor.codes.view(_E4M3), f"{tensor.name}.weight_scale_inv": tensor.scales}


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    codes = stored.read(f"{module}.weight").view(np.uint8)
    return QuantizedTensor(module, shape, scheme, codes, stored.read(f"{module}.weight_scale_inv"))


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """The releases' `quantization_config`; it has one scheme for all linears."""
    scheme = uniform(schemes, linears, "fp8")
    routers = sorted({f"{name.split('.experts.')[0]}.gate" for name in linears if is_expert(name)})
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(scheme.block_shape or ()),
        "modules_to_not_convert": ["lm_head", *routers],
    }


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Scheme of every linear that this layout's `quantization_config` quantizes; CheckpointError if it can't say."""
    config, wanted = stored.config, {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"}
    for key, value in wanted.items():
        if (config.get(key) or value) != value:
            raise CheckpointError(f"{where}: FP8 with {key} {config[key]!r}; {value!r} was expected", NEEDS_ORIGINAL)
    block = config.get("weight_block_size")
    if not isinstance(block, list) or block[1:] != [ACTIVATION_GROUP]:
        raise CheckpointError(f"{where}: FP8 with weight_block_size {block!r}; [128, 128] was expected", NEEDS_ORIGINAL)
    values = {"num_bits": 8, "type": "float", "strategy": "block", "block_shape": block, "activations": "dynamic-group"}
    return {
        module: QuantScheme.from_dict({**values, "scale_dtype": scale_dtype_of(stored, f"{module}.weight_scale_inv")})
        for module in linears
        if not is_unquantized(stored, module, ("weight_scale_inv",))
        or stored.entries[f"{module}.weight"].dtype.itemsize == 1
    }
