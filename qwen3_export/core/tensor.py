"""The quantized tensor, as it lives in memory between a solver, the disk and every format.

codes   uint8   [out, in]       unpacked: unsigned integers, or the bits of E4M3 or E2M1 floats
scales  scale_dtype [rows, groups]  the number that every runtime multiplies by
zeros   uint8   [rows, groups]  or None: symmetric, implicit 2 ** (num_bits - 1), none for floats

weight[o, i] = (value(codes[o, i]) - zeros[r, g]) * scales[r, g]     in fp32
               r = o // rows_per_scale, g = i // group_length (or g_idx[i])

`global_scale` divides NVFP4's scales; `input_scale` is the one that a static scheme rounds inputs by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def __post_init__(self) -> None:
        grid = self.scheme.grid(self.shape)
        if self.codes.shape != self.shape or self.codes.dtype != np.uint8:
            raise ValueError(f"{self.name}: codes are {self.codes.dtype} {self.codes.shape}, not uint8 {self.shape}")
        if self.scales.shape != grid or self.scales.dtype != SCALE_TYPES[self.scheme.scale_dtype]:
            raise ValueError(f"{self.name}: scales are {self.scales.dtype} {self.scales.shape}, not {grid}")
        if (self.zeros is None) != self.scheme.symmetric:
            raise ValueError(f"{self.name}: zeros must be given exactly when the scheme is asymmetric")
        if self.zeros is not None and (self.zeros.shape != grid or self.zeros.dtype != np.uint8):
            raise ValueError(f"{self.name}: zeros are {self.zeros.dtype} {self.zeros.shape}, not uint8 {grid}")
        if (self.global_scale is None) != (self.scheme.scale_dtype != "e4m3"):
            raise ValueError(f"{self.name}: a global scale must be given exactly with e4m3 scales")
        if (self.input_scale is None) != (self.scheme.activations != "static-tensor"):
            raise ValueError(f"{self.name}: an input scale must be given exactly for static activations")
        if int(self.codes.max(initial=0)) > self.scheme.max_code:
            raise ValueError(f"{self.name}: a code exceeds {self.scheme.max_code}")
        if self.scheme.type == "float" and self.scheme.num_bits == 8 and (self.codes & 0x7F == _NAN_CODE).any():
            raise ValueError(f"{self.name}: a code is E4M3's NaN")

    @property
    def scales32(self) -> NDArray[np.float32]:
        """Scales in fp32, `[rows, groups]`, NVFP4's already divided by the global scale."""
        scales = self.scales.astype(np.float32)
        return scales if self.global_scale is None else scales / np.float32(self.global_scale)

    def rows(self, chosen: slice | NDArray) -> QuantizedTensor:
        """Some rows of a tensor whose rows share no scale, as a tensor of their own."""
        assert self.scheme.per_row
        codes, zeros = self.codes[chosen], None if self.zeros is None else self.zeros[chosen]
        shape = (len(codes), self.shape[1])
        return replace(self, shape=shape, codes=codes, scales=self.scales[chosen], zeros=zeros)


def join_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Pieces of rows of one matrix, one below the other."""
    first = parts[0]
    codes = np.concatenate([part.codes for part in parts])
    zeros = None if first.zeros is None else np.concatenate([part.zeros for part in parts if part.zeros is not None])
    scales = np.concatenate([part.scales for part in parts])
    return replace(first, shape=(len(codes), first.shape[1]), codes=codes, scales=scales, zeros=zeros)


def code_values(codes: NDArray[np.uint8], scheme: QuantScheme) -> NDArray[np.float32]:
    """What the codes stand for before zero point and scale."""
    if scheme.type == "int":
        return codes.astype(np.float32)
    if scheme.num_bits == 4:
        return E2M1[codes]
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """`(value(codes) - zeros) * scales` in fp32, shape `[out, in]`."""
    scheme, (out_features, in_features) = tensor.scheme, tensor.shape
    weight = code_values(tensor.codes, scheme)
    if tensor.g_idx is not None:
        zeros: NDArray | np.float32 = np.float32(scheme.midpoint if scheme.type == "int" else 0)
        weight -= zeros if tensor.zeros is None else tensor.zeros[:, tensor.g_idx]
        weight *= tensor.scales32[:, tensor.g_idx]
        return weight
    # A view `[rows, rows per scale, groups, group length]` broadcasts without copies; ragged blocks are padded.
    rows, groups = scheme.grid(tensor.shape)
    padded = (rows * scheme.rows_per_scale(out_features), groups * scheme.group_length(in_features))
    if padded != tensor.shape:
        weight = np.pad(weight, [(0, padded[0] - out_features), (0, padded[1] - in_features)])
    cells = weight.reshape(rows, padded[0] // rows, groups, padded[1] // groups)
    if tensor.zeros is not None:
        cells -= tensor.zeros[:, None, :, None]
    elif scheme.type == "int":
        cells -= np.float32(scheme.midpoint)
    cells *= tensor.scales32[:, None, :, None]
    return np.ascontiguousarray(cells.reshape(padded)[:out_features, :in_features])
