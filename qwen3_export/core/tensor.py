"""The quantized tensor in memory, between solver, disk and formats.

codes   uint8   [out, in]       unpacked: unsigned integers, or the bits of E4M3 or E2M1 floats
scales  scale_dtype [rows, groups]  the number that every runtime multiplies by
zeros   uint8   [rows, groups]  or None: symmetric, implicit 2 ** (num_bits - 1), none for floats

weight[o, i] = (value(codes[o, i]) - zeros[r, g]) * scales[r, g]     in fp32
               r = o // rows_per_scale, g = i // group_length (or g_idx[i])

A block type of ggml (`core.kquant`) has, in place of zeros, some of

mins          uint8 or fp16  [out, groups]   uint8 under a super scale, where `scales` are int8 too
super_scales  fp16 [out, in / 256]           multiply the scales of their 256 weights
super_mins    fp16 [out, in / 256]           multiply the mins

weight[o, i] = value(codes[o, i]) * scales32[o, g] + offsets32[o, g]

`global_scale` divides NVFP4's scales. `input_scale` is the one that a static scheme rounds inputs by; beside NVFP4
weights it multiplies the E4M3 scales that a runtime finds for each 16 inputs (`model.activations`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme

SCALE_TYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# bf16 values in fp16's normal range are exact in bf16, fp16 and fp32 alike.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0
# Values of the sixteen E2M1 codes (OCP Microscaling Formats 1.0): sign, two exponent bits, one mantissa bit.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Without its sign.
_NAN_CODE = 0x7F


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight matrix; see the module docstring for shapes and meaning."""

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    codes: NDArray[np.uint8]
    scales: NDArray
    zeros: NDArray[np.uint8] | None = None
    g_idx: NDArray[np.int32] | None = None
    global_scale: float | None = None
    input_scale: float | None = None
    mins: NDArray | None = None
    super_scales: NDArray[np.float16] | None = None
    super_mins: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        grid = self.scheme.grid(self.shape)
        if self.codes.shape != self.shape or self.codes.dtype != np.uint8:
            raise ValueError(f"{self.name}: codes are {self.codes.dtype} {self.codes.shape}, not uint8 {self.shape}")
        if int(self.codes.max(initial=0)) > self.scheme.max_code:
            raise ValueError(f"{self.name}: a code exceeds {self.scheme.max_code}")
        if self.scheme.ggml_type is not None:
            check_blocks(self)
            return
        if self.scales.shape != grid or self.scales.dtype != SCALE_TYPES[self.scheme.scale_dtype]:
            raise ValueError(f"{self.name}: scales are {self.scales.dtype} {self.scales.shape}, not {grid}")
        if (self.zeros is None) != self.scheme.symmetric:
            raise ValueError(f"{self.name}: zeros must be given exactly when the scheme is asymmetric")
        if self.zeros is not None and (self.zeros.shape != grid or self.zeros.dtype != np.uint8):
            raise ValueError(f"{self.name}: zeros are {self.zeros.dtype} {self.zeros.shape}, not uint8 {grid}")
        if (self.global_scale is None) != (self.scheme.scale_dtype != "e4m3"):
            raise ValueError(f"{self.name}: a global scale must be given exactly with e4m3 scales")
        if (self.input_scale is None) == self.scheme.has_input_scale:
            raise ValueError(f"{self.name}: an input scale must be given exactly for static and NVFP4 activations")
        if self.scheme.type == "float" and self.scheme.num_bits == 8 and (self.codes & 0x7F == _NAN_CODE).any():
            raise ValueError(f"{self.name}: a code is E4M3's NaN")

    @property
    def scales32(self) -> NDArray[np.float32]:
        """Scales in fp32, `[rows, groups]`.

        NVFP4's are already divided by the global scale, integer scales multiplied by the super scale.
        """
        scales = self.scales.astype(np.float32)
        if self.super_scales is not None:
            return _times_super(self.super_scales, scales)
        return scales if self.global_scale is None else scales / np.float32(self.global_scale)

    def rows(self, chosen: slice | NDArray) -> QuantizedTensor:
        """Some rows as a tensor of their own; rows may not share scales."""
        assert self.scheme.per_row
        parts: dict[str, Any] = {key: array[chosen] for key, array in self._by_row().items()}
        return replace(self, shape=(len(parts["codes"]), self.shape[1]), **parts)

    @property
    def offsets32(self) -> NDArray[np.float32] | None:
        """The number added to a group's weights, fp32 `[out, groups]`; None without mins."""
        if self.mins is None:
            return None
        mins = self.mins.astype(np.float32)
        return mins if self.super_mins is None else -_times_super(self.super_mins, mins)

    def _by_row(self) -> dict[str, NDArray]:
        """The arrays whose first axis is the output rows."""
        names = ("codes", "scales", "zeros", "mins", "super_scales", "super_mins")
        return {name: array for name in names if (array := getattr(self, name)) is not None}


def join_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Pieces of rows of one matrix, one below the other."""
    first = parts[0]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in first._by_row()}
    return replace(first, shape=(len(joined["codes"]), first.shape[1]), **joined)


def _times_super(super_scales: NDArray[np.float16], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integer scales `[out, groups]` times the fp16 number of their 256 weights."""
    blocks = super_scales.shape[1]
    return (scales.reshape(len(scales), blocks, -1) * super_scales.astype(np.float32)[..., None]).reshape(scales.shape)


def block_specs(scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, tuple[np.dtype, tuple[int, int]]]:
    """Type and shape of a block type's arrays beside its codes, by field."""
    block, grid = scheme.block_type, scheme.grid(shape)
    assert block is not None
    half, above = np.dtype(np.float16), (shape[0], shape[1] // block.block)
    found: dict[str, tuple[np.dtype, tuple[int, int]]] = {
        "scales": (np.dtype(np.int8) if block.is_super else half, grid)
    }
    if block.has_mins:
        found["mins"] = (np.dtype(np.uint8) if block.is_super else half, grid)
    if block.is_super:
        found["super_scales"] = (half, above)
        if block.has_mins:
            found["super_mins"] = (half, above)
    return found


def check_blocks(tensor: QuantizedTensor) -> None:
    """Raise ValueError when a tensor's arrays are not those of its ggml block type."""
    specs, block = block_specs(tensor.scheme, tensor.shape), tensor.scheme.block_type
    assert block is not None
    if tensor.shape[1] % block.block:
        raise ValueError(f"{tensor.name}: its {tensor.shape[1]} inputs are not divisible by {block.block}")
    for field in ("scales", "zeros", "mins", "super_scales", "super_mins", "g_idx", "global_scale", "input_scale"):
        array = getattr(tensor, field)
        if (array is None) != (field not in specs):
            raise ValueError(f"{tensor.name}: {block.name} has {'no ' * (field not in specs)}{field}")
        if array is not None and (array.dtype, array.shape) != specs[field]:
            raise ValueError(f"{tensor.name}: {field} are {array.dtype} {array.shape}, not {specs[field]}")
    if block.is_super and tensor.scales.size:
        low, high = block.scale_range
        if tensor.scales.min() < low or tensor.scales.max() > high:
            raise ValueError(f"{tensor.name}: a scale lies outside of {low} to {high}")
        if tensor.mins is not None and int(tensor.mins.max()) > block.max_min:
            raise ValueError(f"{tensor.name}: a min exceeds {block.max_min}")


def code_values(codes: NDArray[np.uint8], scheme: QuantScheme) -> NDArray[np.float32]:
    """The values of codes before zero point and scale are applied.

    For a ggml block type the midpoint is already subtracted.
    """
    if block := scheme.block_type:
        if block.values is not None:
            return np.array(block.values, np.float32)[codes]
        return codes.astype(np.float32) - np.float32(scheme.midpoint if scheme.symmetric else 0)
    if scheme.type == "int":
        return codes.astype(np.float32)
    if scheme.num_bits == 4:
        return E2M1[codes]
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """`(value(codes) - zeros) * scales` in fp32, shape `[out, in]`."""
    scheme, (out_features, in_features) = tensor.scheme, tensor.shape
    weight = code_values(tensor.codes, scheme)
    if scheme.ggml_type is not None:
        groups = weight.reshape(out_features, -1, scheme.group_length(in_features))
        groups *= tensor.scales32[..., None]
        if (offsets := tensor.offsets32) is not None:
            groups += offsets[..., None]
        return weight
    if tensor.g_idx is not None:
        zeros: NDArray | np.float32 = np.float32(scheme.midpoint if scheme.type == "int" else 0)
        weight -= zeros if tensor.zeros is None else tensor.zeros[:, tensor.g_idx]
        weight *= tensor.scales32[:, tensor.g_idx]
        return weight
    # A view `[rows, rows per scale, groups, group length]` broadcasts without copies; ragged blocks are padded.
    rows, columns = scheme.grid(tensor.shape)
    padded = (rows * scheme.rows_per_scale(out_features), columns * scheme.group_length(in_features))
    if padded != tensor.shape:
        weight = np.pad(weight, [(0, padded[0] - out_features), (0, padded[1] - in_features)])
    cells = weight.reshape(rows, padded[0] // rows, columns, padded[1] // columns)
    if tensor.zeros is not None:
        cells -= tensor.zeros[:, None, :, None]
    elif scheme.type == "int":
        cells -= np.float32(scheme.midpoint)
    cells *= tensor.scales32[:, None, :, None]
    return np.ascontiguousarray(cells.reshape(padded)[:out_features, :in_features])
