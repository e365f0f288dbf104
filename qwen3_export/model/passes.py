"""Norm and rotary embedding as compiled passes over rows of bf16 or fp32 numbers.

torch performs the same operations one after another, with copies in between. A bf16 number is the upper half of an fp32
number: arrays hold these halves as uint16, or the bits of fp32 as uint32, and all arithmetic is in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.model.compiled import Array, compiled, reassociated

Halves = NDArray[np.uint16]
Numbers = NDArray[np.uint16] | NDArray[np.uint32]
_ONE = np.float32(1.0)
_HALF, _LAST, _CUT = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)


@compiled
def expand(numbers: Numbers, bits: Any) -> None:
    """The bits of fp32 numbers from bf16 or fp32."""
    for i in range(len(numbers)):
        bits[i] = np.uint32(numbers[i]) << np.uint32(32 - 8 * numbers.itemsize)


@compiled
def _cut(bits: Any, numbers: Numbers) -> None:
    """The reverse of `expand`; ties are rounded to even."""
    for i in range(len(numbers)):
        if numbers.itemsize == 4:
            numbers[i] = bits[i]
        else:
            numbers[i] = np.uint16((bits[i] + _HALF + ((bits[i] >> _CUT) & _LAST)) >> _CUT)


@reassociated
def _sum_of_squares(row: Array) -> np.float32:
    total = np.float32(0.0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@compiled
def _norm(values: Array, weight: Array, eps: np.float32, made: Array) -> None:
    """RMSNorm of every row."""
    wide = values.shape[1]
    for t in range(len(values)):
        scale = _ONE / np.sqrt(_sum_of_squares(values[t]) / np.float32(wide) + eps)
        for i in range(wide):
            made[t, i] = values[t, i] * scale * weight[i]


@compiled
def _turn(
    numbers: Numbers, weight: Array, eps: np.float32, cos: Array, sin: Array, turned: Numbers
) -> None:  # fmt: skip
    """Norm and rotary embedding: `[tokens, heads, head_dim]` to `[heads, tokens, head_dim]`."""
    tokens, heads, wide = numbers.shape
    half = wide // 2
    row, out = np.empty(wide, np.float32), np.empty(wide, np.float32)
    row_bits, out_bits = row.view(np.uint32), out.view(np.uint32)
    for t in range(tokens):
        for h in range(heads):
            expand(numbers[t, h], row_bits)
            scale = _ONE / np.sqrt(_sum_of_squares(row) / np.float32(wide) + eps)
            for i in range(wide):
                row[i] = row[i] * scale * weight[i]
            for i in range(half):
                first, second = row[i], row[i + half]
                out[i] = first * cos[t, i] - second * sin[t, i]
                out[i + half] = second * cos[t, i] + first * sin[t, i]
            _cut(out_bits, turned[h, t])


@compiled
def _add(halves: Halves, sums: Array) -> None:
    """Adds all rows to `sums`."""
    row, total = np.empty(halves.shape[1], np.float32), np.zeros(halves.shape[1], np.float32)
    bits = row.view(np.uint32)
    for t in range(len(halves)):
        expand(halves[t], bits)
        for i in range(len(row)):
            total[i] += row[i]
    for i in range(len(row)):
        sums[i] += total[i]


def normed_and_turned(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of every head, then the rotary embedding.

    From `[batch, tokens, heads, head_dim]` to `[batch, heads, tokens, head_dim]`, both bf16 or fp32; `weight`
    `[head_dim]`, `cos` and `sin` `[tokens, head_dim / 2]` in fp32.

    It computes what `rms_norm` and `rotate` of `model.block` do in fp32; only the order in which squares are added
    differs.
    """
    batch, tokens, heads, wide = x.shape
    turned = torch.empty(batch, heads, tokens, wide, dtype=x.dtype)
    tables = [np.ascontiguousarray(table.numpy(), np.float32) for table in (weight, cos, sin)]
    for row in range(batch):
        _turn(numbers_of(x[row]), tables[0], np.float32(eps), tables[1], tables[2], numbers_of(turned[row]))
    return turned


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, all in fp32.

    It computes what `rms_norm` of `model.block` does; only the order in which squares are added differs.
    """
    made, wide = torch.empty(x.shape), x.shape[-1]
    rows = x.contiguous().view(-1, wide).numpy()
    _norm(rows, weight.contiguous().numpy(), np.float32(eps), made.view(-1, wide).numpy())
    return made


def add_rows(x: Tensor, sums: Tensor) -> None:
    """Add the rows of a bf16 `[tokens, n]` to the fp32 `sums` `[n]`."""
    _add(halves_of(x), sums.numpy())


def halves_of(tensor: Tensor) -> Any:
    """A bf16 tensor's numbers as uint16, copied only where the tensor is not contiguous."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def numbers_of(tensor: Tensor) -> Any:
    """The bits of an fp32 tensor's numbers as uint32, or a bf16 tensor's halves."""
    return tensor.contiguous().numpy().view(np.uint32) if tensor.dtype == torch.float32 else halves_of(tensor)
