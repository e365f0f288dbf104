"""The quantized tensor, as it lives in memory between a solver, the disk and every format.

codes   uint8   [out, in]       unsigned, one per weight, unpacked
scales  scale_dtype [out, groups]  the number that every runtime multiplies by
zeros   uint8   [out, groups]   or None: symmetric, implicit 2 ** (num_bits - 1)

weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]     g = i // group_length, in fp32
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.recipe import QuantScheme

SCALE_TYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
# bf16 values in fp16's normal range are exact in bf16, fp16 and fp32 alike.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0


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

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        grid = (out_features, self.scheme.num_groups(in_features))
        if self.codes.shape != self.shape or self.codes.dtype != np.uint8:
            raise ValueError(f"{self.name}: codes are {self.codes.dtype} {self.codes.shape}, not uint8 {self.shape}")
        if self.scales.shape != grid or self.scales.dtype != SCALE_TYPES[self.scheme.scale_dtype]:
            raise ValueError(f"{self.name}: scales are {self.scales.dtype} {self.scales.shape}, not {grid}")
        if (self.zeros is None) != self.scheme.symmetric:
            raise ValueError(f"{self.name}: zeros must be given exactly when the scheme is asymmetric")
        if self.zeros is not None and (self.zeros.shape != grid or self.zeros.dtype != np.uint8):
            raise ValueError(f"{self.name}: zeros are {self.zeros.dtype} {self.zeros.shape}, not uint8 {grid}")
        if int(self.codes.max(initial=0)) > self.scheme.max_code:
            raise ValueError(f"{self.name}: a code exceeds {self.scheme.max_code}")

    @property
    def scales32(self) -> NDArray[np.float32]:
        """Scales in fp32, `[out, groups]`; exact."""
        return self.scales.astype(np.float32)


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """`(codes - zeros) * scales` in fp32, shape `[out, in]`."""
    out_features, in_features = tensor.shape
    zeros = tensor.zeros
    if zeros is None:
        zeros = np.full((out_features, 1), tensor.scheme.midpoint, np.uint8)
    if tensor.g_idx is not None:
        spread = zeros[:, tensor.g_idx] if tensor.zeros is not None else zeros
        return (tensor.codes.astype(np.float32) - spread) * tensor.scales32[:, tensor.g_idx]
    groups = tensor.scheme.num_groups(in_features)
    weight = tensor.codes.astype(np.float32).reshape(out_features, groups, -1)
    weight -= zeros[:, :, None]
    weight *= tensor.scales32[:, :, None]
    return weight.reshape(tensor.shape)
