"""compressed-tensors: the layout that vLLM, SGLang and transformers load as it is.

The scheme decides which of its formats is written.

pack-quantized        integers, inputs left alone
    NAME.weight_packed      int32 [out, in * bits / 32]     low bits first, across words for 3 bits
    NAME.weight_scale       [out, groups]
    NAME.weight_zero_point  int32 [out * bits / 32, groups] asymmetric only, packed along out
    NAME.weight_shape       int64 [2]
    NAME.weight_g_idx       int32 [in]              group of each input; in older folders of other tools only
int-quantized, float-quantized      8-bit weights whose inputs are rounded, and all FP8
    NAME.weight             int8 (code − 128) or E4M3 [out, in]
    NAME.weight_scale       [out, 1], [rows, groups] for blocks, [1] for a whole tensor
    NAME.weight_zero_point  int8, asymmetric only
    NAME.input_scale        [1], static activations only
mxfp8-quantized
    NAME.weight             E4M3 [out, in]
    NAME.weight_scale       uint8 exponents [out, in / 32]
mxfp4-pack-quantized, nvfp4-pack-quantized
    NAME.weight_packed      uint8 [out, in / 2]             two E2M1 codes, low nibble first
    NAME.weight_scale       uint8 exponents, or E4M3 [out, groups]
    NAME.weight_global_scale  fp32 [1]                      nvfp4 only; scales are divided by it
    NAME.input_global_scale   fp32 [1]                      the same of inputs, where they are rounded to nvfp4 too
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.layouts import IDLE, Stored, group_index
from qwen3_export.core.layouts.compressed_tensors.config import config, read_schemes
from qwen3_export.core.layouts.compressed_tensors.formats import FP4, MXFP8, format_of
from qwen3_export.core.pack import pack_bytes, pack_int32, unpack_bytes, unpack_int32
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec

__all__ = ["config", "format_of", "pack", "read_schemes", "specs", "supports", "unpack"]

_E4M3, _INT8, _BYTE = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype("i1"), np.dtype("u1")


def supports(scheme: QuantScheme) -> str | None:
    """Everything fits but integers in blocks, and block types of ggml."""
    if scheme.ggml_type is not None:
        return f"{scheme.ggml_type} is a block type of ggml: use layout ggml"
    if scheme.type == "int" and not scheme.activations and not scheme.per_row:
        return "packed integers have a scale per channel or group"
    return None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    (out_features, in_features), kind = shape, format_of(scheme)
    scale = SCALE_TYPES[scheme.scale_dtype]
    found: dict[str, Spec] = {}
    if _is_packed(kind, module, stored):
        found[f"{module}.weight_packed"] = (np.dtype("<i4"), (out_features, _words(in_features, scheme)))
        found[f"{module}.weight_scale"] = (scale, scheme.grid(shape))
        if not scheme.symmetric:
            words = (_words(out_features, scheme), scheme.num_groups(in_features))
            found[f"{module}.weight_zero_point"] = (np.dtype("<i4"), words)
        found[f"{module}.weight_shape"] = (np.dtype("<i8"), (2,))
    elif kind in FP4.values():
        found[f"{module}.weight_packed"] = (_BYTE, (out_features, in_features // 2))
        found[f"{module}.weight_scale"] = (_BYTE if scheme.scale_dtype == "e8m0" else _E4M3, scheme.grid(shape))
        if scheme.scale_dtype == "e4m3":
            found[f"{module}.weight_global_scale"] = (np.dtype("<f4"), (1,))
        if scheme.has_input_scale:
            found[f"{module}.input_global_scale"] = (np.dtype("<f4"), (1,))
    else:
        found[f"{module}.weight"] = (_E4M3 if scheme.type == "float" else _INT8, shape)
        found[f"{module}.weight_scale"] = (_BYTE if kind == MXFP8 else scale, _scale_shape(shape, scheme))
        if not scheme.symmetric:
            found[f"{module}.weight_zero_point"] = (_INT8, scheme.grid(shape))
        if scheme.activations == "static-tensor":
            found[f"{module}.input_scale"] = (SCALE_TYPES["bf16"], (1,))
    return {**found, **_foreign(stored, module, shape, scheme, found)} if stored else found


def _is_packed(kind: str, module: str, stored: Stored | None) -> bool:
    """Whether integers are packed into words.

    In a folder of ours the scheme decides it; in another tool's, the name of the stored tensor tells.
    """
    if kind not in ("pack-quantized", "int-quantized"):
        return False
    if stored is None or (f"{module}.weight_packed" in stored) == (f"{module}.weight" in stored):
        return kind == "pack-quantized"
    return f"{module}.weight_packed" in stored


def _foreign(
    stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme, found: Mapping[str, Spec]
) -> dict[str, Spec]:
    """The specs changed to what other releases of compressed-tensors store."""
    specs: dict[str, Spec] = {}
    for name, (dtype, wanted) in found.items():
        suffix = name.rpartition(".")[2]
        if suffix == "weight_zero_point" and stored.dtype(name, dtype, _INT8) == _INT8:
            specs[name] = (_INT8, stored.shape(name, scheme.grid(shape)))
        elif suffix == "input_scale":
            specs[name] = (stored.dtype(name), stored.shape(name, wanted))
        elif suffix == "weight_shape":
            specs[name] = (stored.dtype(name, dtype, np.dtype("<i4")), wanted)
        elif suffix in ("weight_scale", "weight_global_scale", "input_global_scale"):
            specs[name] = (dtype, stored.shape(name, wanted))
    if (order := f"{module}.weight_g_idx") in stored:
        specs[order] = (np.dtype("<i4"), shape[1:])
    for suffix in IDLE:
        if (name := f"{module}.{suffix}") in stored and name not in found:
            specs[name] = (stored.entries[name].dtype, stored.entries[name].shape)
    return specs


def _words(count: int, scheme: QuantScheme) -> int:
    return math.ceil(count * scheme.num_bits / 32)


def _scale_shape(shape: tuple[int, int], scheme: QuantScheme) -> tuple[int, ...]:
    return (1,) if scheme.strategy == "tensor" else scheme.grid(shape)


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    name, scheme, kind = tensor.name, tensor.scheme, format_of(tensor.scheme)
    arrays: dict[str, NDArray]
    if kind == "pack-quantized":
        arrays = {f"{name}.weight_packed": pack_int32(tensor.codes, scheme.num_bits)}
        arrays[f"{name}.weight_scale"] = tensor.scales
        if tensor.zeros is not None:
            words = pack_int32(np.ascontiguousarray(tensor.zeros.T), scheme.num_bits)
            arrays[f"{name}.weight_zero_point"] = np.ascontiguousarray(words.T)
        return {**arrays, f"{name}.weight_shape": np.array(tensor.shape, "<i8")}
    if kind in FP4.values():
        scales = tensor.scales.view(_BYTE) if scheme.scale_dtype == "e8m0" else tensor.scales
        arrays = {f"{name}.weight_packed": pack_bytes(tensor.codes, 4), f"{name}.weight_scale": scales}
        if tensor.global_scale is not None:
            arrays[f"{name}.weight_global_scale"] = np.array([tensor.global_scale], "<f4")
        if tensor.input_scale is not None:
            arrays[f"{name}.input_global_scale"] = np.array([1 / tensor.input_scale], "<f4")
        return arrays
    codes = tensor.codes.view(_E4M3) if scheme.type == "float" else _signed(tensor.codes)
    scales = tensor.scales.view(_BYTE) if kind == MXFP8 else tensor.scales
    arrays = {f"{name}.weight": codes, f"{name}.weight_scale": scales.reshape(_scale_shape(tensor.shape, scheme))}
    if tensor.zeros is not None:
        arrays[f"{name}.weight_zero_point"] = _signed(tensor.zeros)
    if tensor.input_scale is not None:
        arrays[f"{name}.input_scale"] = np.array([tensor.input_scale], SCALE_TYPES["bf16"])
    return arrays


def _signed(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unsigned codes less 128, as int8 bits; the same operation turns them back."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    kind, scales = format_of(scheme), stored.read(f"{module}.weight_scale").reshape(scheme.grid(shape))
    if kind in FP4.values():
        codes, scales = unpack_bytes(stored.read(f"{module}.weight_packed"), 4), scales.view(_scale_type(scheme))
        shared = float(stored.read(f"{module}.weight_global_scale").item()) if scheme.scale_dtype == "e4m3" else None
        inputs = _of_inputs(stored, f"{module}.input_global_scale") if scheme.has_input_scale else None
        return QuantizedTensor(module, shape, scheme, codes, scales, global_scale=shared, input_scale=inputs)
    if _is_packed(kind, module, stored):
        codes = unpack_int32(stored.read(f"{module}.weight_packed"), scheme.num_bits, shape[1])
    else:
        weight = stored.read(f"{module}.weight").view(np.uint8)
        codes = weight if scheme.type == "float" else _unsigned(weight, scheme)
    if kind == MXFP8:
        scales = scales.view(_scale_type(scheme))
    zeros = None if scheme.symmetric else _zero_points(stored, module, shape, scheme)
    static = scheme.activations == "static-tensor"
    fixed = float(stored.read(f"{module}.input_scale").item()) if static else None
    order = group_index(stored, f"{module}.weight_g_idx", shape, scheme)
    return QuantizedTensor(module, shape, scheme, codes, scales, zeros, order, input_scale=fixed)


def _of_inputs(stored: Stored, name: str) -> float:
    """The number that multiplies the scales of inputs, from the one that divides them."""
    divisor = float(stored.read(name).item())
    if not 0 < divisor < math.inf:
        raise ValueError(f"{name} is {divisor}, a positive number was expected")
    return 1 / divisor


def _scale_type(scheme: QuantScheme) -> np.dtype:
    return SCALE_TYPES[scheme.scale_dtype]


def _unsigned(stored: NDArray[np.uint8], scheme: QuantScheme) -> NDArray[np.uint8]:
    """Signed codes, each in a byte, with the midpoint added."""
    return stored + np.uint8(scheme.midpoint)


def _zero_points(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> NDArray[np.uint8]:
    zeros = stored.read(f"{module}.weight_zero_point")
    if zeros.dtype == _INT8:
        return _unsigned(zeros.view(np.uint8), scheme).reshape(scheme.grid(shape))
    return np.ascontiguousarray(unpack_int32(np.ascontiguousarray(zeros.T), scheme.num_bits, shape[0]).T)
