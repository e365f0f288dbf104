"""Integers of 2, 4 and 8 bits beside activations in floats: ONNX Runtime's `MatMulNBits`.

    B             uint8 [out, groups, group·bits/8], low bits first
    scales        [out, groups]
    zero points   packed along groups, absent when symmetric (implicit 2^(bits-1))

Groups have 16 to 256 inputs. Where a row has one scale, it is repeated for each group of the row: the numbers that are
multiplied stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import pack
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx.graph import CONTRIB, GraphBuilder
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.result import not_integer

_BLOCKS = (256, 128, 64, 32, 16)


def supports(scheme: QuantScheme) -> str | None:
    """Why `MatMulNBits` does not hold a scheme, or None when it does."""
    if reason := not_integer(scheme):
        return reason
    if scheme.num_bits not in (2, 4, 8):
        return f"MatMulNBits runs with 2, 4 and 8 bits, not {scheme.num_bits}"
    if scheme.strategy == "channel":
        return None
    if scheme.strategy != "group":
        return f"one scale per {scheme.strategy} has no place in MatMulNBits; use strategy: group or channel"
    if scheme.group_size not in _BLOCKS:
        return f"MatMulNBits needs a group_size that is a power of two from 16 to 256, not {scheme.group_size}"
    return None


def divides(scheme: QuantScheme, in_features: int) -> bool:
    """Whether a row is a whole number of groups, in a supported scheme."""
    return scheme.strategy != "channel" or in_features % _BLOCKS[-1] == 0


def block_size(scheme: QuantScheme, in_features: int) -> int:
    """Number of inputs in one of the operator's groups.

    For a row with one scale it is the largest that divides the row.
    """
    if scheme.strategy == "channel":
        return next(size for size in _BLOCKS if in_features % size == 0)
    return scheme.group_length(in_features)


def stored(graph: GraphBuilder, weights: Sequence[QuantizedTensor], name: str, dtype: ir.DataType) -> list[ir.Value]:
    """Write codes, scales and zero points of stacked matrices.

    All are of one scheme; scales are stored in `dtype`.
    """
    scheme, in_features = weights[0].scheme, weights[0].shape[1]
    length, bits = block_size(scheme, in_features), scheme.num_bits
    rows, groups = sum(weight.shape[0] for weight in weights), -(-in_features // length)

    def repeated(values: NDArray) -> NDArray:
        return np.repeat(values, groups, axis=1) if scheme.strategy == "channel" else values

    def write(part: str, parts: Iterable[NDArray], kind: ir.DataType, width: int) -> ir.Value:
        shape = [rows, groups, width] if part == "codes" else [rows, width]
        return graph.weight_parts(f"{name}.{part}", parts, kind, shape)

    codes = (pack.pack_bytes(weight.codes, bits) for weight in weights)
    scales = (repeated(weight.scales).astype(dtype.numpy()) for weight in weights)
    values = [write("codes", codes, ir.DataType.UINT8, length * bits // 8), write("scales", scales, dtype, groups)]
    if not scheme.symmetric:
        zeros = (pack.pack_bytes(repeated(weight.zeros), bits) for weight in weights if weight.zeros is not None)
        values.append(write("zeros", zeros, ir.DataType.UINT8, -(-groups * bits // 8)))
    return values


def product(
    graph: GraphBuilder, x: ir.Value, weights: Sequence[QuantizedTensor], parts: list[ir.Value], name: str, level: int
) -> ir.Value:
    """`x @ weight.T` for stacked matrices.

    `parts` are what `stored` has written; `level` is the accuracy level.
    """
    scheme, in_features = weights[0].scheme, weights[0].shape[1]
    return graph.op(
        "MatMulNBits",
        [x, *parts],
        name,
        CONTRIB,
        K=in_features,
        N=sum(weight.shape[0] for weight in weights),
        bits=scheme.num_bits,
        block_size=block_size(scheme, in_features),
        accuracy_level=level,
    )
