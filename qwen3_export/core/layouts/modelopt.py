"""The layout of NVIDIA's ModelOpt, FP8 and NVFP4.

Such folders are read but never written, since compressed-tensors holds the same schemes.

FP8    NAME.weight          E4M3 [out, in]
       NAME.weight_scale    fp32, one number
       NAME.input_scale     fp32, one number: inputs are rounded to FP8 too; absent where they are not
NVFP4  NAME.weight          uint8 [out, in / 2]        two E2M1 codes, low nibble first
       NAME.weight_scale    E4M3 [out, in / 16]
       NAME.weight_scale_2  fp32, one number that scales are multiplied by
       NAME.input_scale     fp32, one number: inputs are rounded to NVFP4 too, their scales multiplied by it; absent
                            where they are not

An expert that no token of calibration reached has an input_scale of 0, or none. It gets the largest one that experts of
its layer have for the same input, which is what TensorRT-LLM uses for all of them. Gate and up have one input.

Scales of a quantized key/value cache (k_scale, v_scale) are ignored: no weight depends on them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import EXPERTS, is_expert
from qwen3_export.core.layouts import NEEDS_ORIGINAL, Schemes, Shapes, Stored, is_unquantized, scale_dtype_of
from qwen3_export.core.pack import unpack_bytes
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError, InputWarning, RecipeError

_E4M3, _BYTE = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype("u1")
_ALGORITHMS = ("FP8", "NVFP4")
_CACHE = ("k_scale", "v_scale", "output_scale")
_NVFP4 = QuantScheme(num_bits=4, type="float", strategy="group", group_size=16, scale_dtype="e4m3")
_READERS = {"gate_proj": ("gate_proj", "up_proj")}
_UNREACHED = (
    "experts that no token of calibration reached have no scale of their inputs: they get the largest one of their "
    "layer's experts"
)
_NOT_WRITTEN = "ModelOpt's layout is read and never written: use compressed-tensors"


def supports(scheme: QuantScheme) -> str | None:
    """Nothing is: this layout is only read."""
    return _NOT_WRITTEN


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    if stored is None:
        raise RecipeError(f"{module}: {_NOT_WRITTEN}")
    scale = SCALE_TYPES["fp32"]
    if scheme.num_bits == 4:
        found: dict[str, Spec] = {
            f"{module}.weight": (_BYTE, (shape[0], shape[1] // 2)),
            f"{module}.weight_scale": (_E4M3, scheme.grid(shape)),
            f"{module}.weight_scale_2": (scale, stored.shape(f"{module}.weight_scale_2", (1,))),
        }
    else:
        name = f"{module}.weight_scale"
        found = {f"{module}.weight": (_E4M3, shape), name: (stored.dtype(name), stored.shape(name, (1,)))}
    for suffix in ("input_scale", *_CACHE):
        if (name := f"{module}.{suffix}") in stored:
            found[name] = (stored.dtype(name), stored.shape(name, (1,)))
    return found


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    raise RecipeError(f"{tensor.name}: {_NOT_WRITTEN}")


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    scales = stored.read(f"{module}.weight_scale")
    if scheme.num_bits == 4:
        codes = unpack_bytes(stored.read(f"{module}.weight"), 4)
        shared = float(stored.read(f"{module}.weight_scale_2").item())
        if not shared > 0:
            raise ValueError(f"{module}.weight_scale_2 is {shared}, a positive number was expected")
        inputs = _input_scale(stored, module, scheme)
        return QuantizedTensor(module, shape, scheme, codes, scales, global_scale=1 / shared, input_scale=inputs)
    codes = stored.read(f"{module}.weight").view(np.uint8)
    fixed = _input_scale(stored, module, scheme)
    return QuantizedTensor(module, shape, scheme, codes, scales.reshape(scheme.grid(shape)), input_scale=fixed)


def _input_scale(stored: Stored, module: str, scheme: QuantScheme) -> float | None:
    if not scheme.has_input_scale:
        return None
    scale = _stored_scale(stored, module)
    if scale == 0 and is_expert(module):
        scale = max(_stored_scale(stored, other) for other in _readers_of_input(stored, module))
        if scale > 0:
            warnings.warn(_UNREACHED, InputWarning, stacklevel=2)
    if not 0 < scale < math.inf:
        raise ValueError(f"{module}.input_scale is {scale}, a positive number was expected")
    return scale


def _stored_scale(stored: Stored, module: str) -> float:
    """A linear's own input scale, 0 where an expert has none."""
    name = f"{module}.input_scale"
    return float(stored.read(name).item()) if name in stored or not is_expert(module) else 0.0


def _input(module: str) -> tuple[str, str]:
    """Whose input an expert's linear reads: its layer's, and by which linear.

    Any other linear stands for its own input.
    """
    if not is_expert(module):
        return module, ""
    block, _, rest = module.partition(EXPERTS)
    linear = rest.partition(".")[2]
    return block, "gate_proj" if linear == "up_proj" else linear


def _readers_of_input(stored: Stored, module: str) -> Iterator[str]:
    """The linears of all experts of a layer that read one kind of input."""
    block, first = _input(module)
    for expert in itertools.count():
        names = [f"{block}{EXPERTS}{expert}.{linear}" for linear in _READERS.get(first, (first,))]
        if f"{names[0]}.weight" not in stored:
            return
        yield from names


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """See the package docstring."""
    raise RecipeError(_NOT_WRITTEN, "use compressed-tensors")


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Scheme of every linear that this layout's `quantization_config` quantizes; CheckpointError if it can't say."""
    algorithm = str(stored.config.get("quant_algo")).upper()
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{where}: ModelOpt with quant_algo {algorithm}; FP8 and NVFP4 can be read", NEEDS_ORIGINAL
        )
    if any(name.endswith(_CACHE) for name in stored.entries):
        warnings.warn(
            f"{where}: the weights are read as they are; rounding of the key/value cache, which ModelOpt's runtimes "
            "may do beside, is left out",
            InputWarning,
            stacklevel=2,
        )
    suffix, schemes = ".input_scale", Schemes()
    rounded = {_input(name.removesuffix(suffix)) for name in stored.entries if name.endswith(suffix)}
    for module in linears:
        if is_unquantized(stored, module, ("weight_scale", "weight_scale_2")):
            continue
        scheme_of = _nvfp4 if algorithm == "NVFP4" else _fp8
        schemes[module] = scheme_of(stored, module, _input(module) in rounded)
    return schemes


def _nvfp4(stored: Stored, module: str, rounded: bool) -> QuantScheme:
    return replace(_NVFP4, activations="dynamic-group") if rounded else _NVFP4


def _fp8(stored: Stored, module: str, rounded: bool) -> QuantScheme:
    return QuantScheme(
        num_bits=8, type="float", strategy="tensor", group_size=None,
        scale_dtype=scale_dtype_of(stored, f"{module}.weight_scale"),
        activations="static-tensor" if rounded else None,
    )  # fmt: skip
