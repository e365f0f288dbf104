"""Keys and values between calls of GroupQueryAttention.

They are kept in the type of activations, or as int8 or int4 codes.

    int8    int8  [batch, kv_heads, positions, head_dim]         code = round(value / scale)
    int4    uint8 [batch, kv_heads, positions, head_dim / 2]     two codes a byte

A quantized cache has one scale per channel of each key/value head, fp32 `[kv_heads, 1, head_dim]`, found on calibration
samples. The operator rounds new keys and values, and multiplies with the codes (ONNX Runtime,
docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

BITS = {"int8": 8, "int4": 4}
# Inputs of the operator between the total length and the scales: cos, sin, positions, bias, sinks.
_ABSENT = 5


@dataclass(frozen=True)
class FloatCache:
    """Keys and values in the type of activations."""

    dtype: ir.DataType
    attributes: dict[str, Any] = field(default_factory=dict)

    def width(self, head_dim: int) -> int:
        """Elements of a cached vector."""
        return head_dim

    def inputs(self, graph: GraphBuilder, layer: int) -> list[ir.Value | None]:
        """Further inputs of the operator."""
        return []


@dataclass(frozen=True)
class QuantizedCache:
    """Codes of `bits` bits.

    `scales` are keys' and values' of each layer, fp32 `[kv_heads, 1, head_dim]`.
    """

    bits: int
    scales: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]

    @property
    def dtype(self) -> ir.DataType:
        """Type of the stored codes."""
        return ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8

    @property
    def attributes(self) -> dict[str, Any]:
        """The operator's attributes for the codes."""
        return {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": self.bits}

    def width(self, head_dim: int) -> int:
        """Elements of a cached vector."""
        return head_dim * self.bits // 8

    def inputs(self, graph: GraphBuilder, layer: int) -> list[ir.Value | None]:
        """The scales of one layer, after the optional inputs that Qwen3 does not use."""
        names = (f"layer.{layer}.attention.{kind}_scale" for kind in ("key", "value"))
        return [None] * _ABSENT + [graph.weight(n, s) for n, s in zip(names, self.scales[layer], strict=True)]
