"""compressed-tensors' `pack-quantized`: what vLLM, SGLang and transformers load as it is.

NAME.weight_packed      int32 [out, in * bits / 32]     low bits first
NAME.weight_scale       bf16  [out, groups]
NAME.weight_zero_point  int32 [out * bits / 32, groups] asymmetric only
NAME.weight_shape       int64 [2]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.pack import pack_int32, unpack_int32
from qwen3_export.core.recipe import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec


def supports(_scheme: QuantScheme) -> str | None:
    """Every integer scheme fits."""
    return None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, Spec]:
    """See the package docstring."""
    out_features, in_features = shape
    per_word, groups = 32 // scheme.num_bits, scheme.num_groups(in_features)
    found: dict[str, Spec] = {
        f"{module}.weight_packed": (np.dtype("<i4"), (out_features, math.ceil(in_features / per_word))),
        f"{module}.weight_scale": (SCALE_TYPES[scheme.scale_dtype], (out_features, groups)),
    }
    if not scheme.symmetric:
        rows = math.ceil(out_features / per_word)
        found[f"{module}.weight_zero_point"] = (np.dtype("<i4"), (rows, groups))
    found[f"{module}.weight_shape"] = (np.dtype("<i8"), (2,))
    return found


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    bits = tensor.scheme.num_bits
    arrays = {
        f"{tensor.name}.weight_packed": pack_int32(tensor.codes, bits),
        f"{tensor.name}.weight_scale": tensor.scales,
    }
    if tensor.zeros is not None:
        words = pack_int32(np.ascontiguousarray(tensor.zeros.T), bits)
        arrays[f"{tensor.name}.weight_zero_point"] = np.ascontiguousarray(words.T)
    arrays[f"{tensor.name}.weight_shape"] = np.array(tensor.shape, "<i8")
    return arrays


def unpack(read: Callable[[str], NDArray], module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    out_features, in_features = shape
    codes = unpack_int32(read(f"{module}.weight_packed"), scheme.num_bits, in_features)
    zeros = None
    if not scheme.symmetric:
        words = np.ascontiguousarray(read(f"{module}.weight_zero_point").T)
        zeros = np.ascontiguousarray(unpack_int32(words, scheme.num_bits, out_features).T)
    return QuantizedTensor(module, shape, scheme, codes, read(f"{module}.weight_scale"), zeros)


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """One group of targets per distinct scheme; what stays in 16 bits is in `ignore`."""
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, scheme in enumerate(distinct):
        members = [name for name, found in schemes.items() if found == scheme]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(distinct) == 1 else members,
            "weights": {
                "num_bits": scheme.num_bits,
                "type": scheme.type,
                "symmetric": scheme.symmetric,
                "strategy": scheme.strategy,
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    plain = [name for name in linears if name not in schemes]
    routers = ["re:.*mlp.gate$"] if any(".experts." in name for name in linears) else []
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *routers, *plain],
    }
