"""Passes over rows of bf16 or fp32 numbers, compiled: what torch does one operation after another, with copies between.

A bf16 number is the upper half of an fp32 number. Arrays hold the halves as uint16; between, everything is fp32.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.model.compiled import compiled, reassociated

Array = NDArray[np.float32]
Halves = NDArray[np.uint16]
_ONE = np.float32(1.0)
_HALF, _LAST, _CUT = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)


@compiled
def expand(halves: Halves, bits: Any) -> None:
    """bf16 to the bits of fp32."""
    for i in range(len(halves)):
        bits[i] = np.uint32(halves[i]) << _CUT


def bring(values: Any, row: Any) -> None:
    """Numbers to fp32, from bf16 or as they are: for compiled code, which chooses by their type."""
    raise NotImplementedError


@overload(bring)
def _bring(values: Any, row: Any) -> Any:
    def copy(values: Any, row: Any) -> None:
        for i in range(len(row)):
            row[i] = values[i]

    def widen(values: Any, row: Any) -> None:
        expand(values, row.view(np.uint32))

    return copy if values.dtype == numba.float32 else widen


@compiled
def _cut(bits: Any, halves: Halves) -> None:
    """fp32 to bf16, half to even."""
    for i in range(len(halves)):
        halves[i] = np.uint16((bits[i] + _HALF + ((bits[i] >> _CUT) & _LAST)) >> _CUT)


def keep(row: Any, values: Any) -> None:
    """The reverse of `bring`, half to even."""
    raise NotImplementedError


@overload(keep)
def _keep(row: Any, values: Any) -> Any:
    def copy(row: Any, values: Any) -> None:
        for i in range(len(row)):
            values[i] = row[i]

    def cut(row: Any, values: Any) -> None:
        _cut(row.view(np.uint32), values)

    return copy if values.dtype == numba.float32 else cut


@reassociated
def _energy(row: Array) -> np.float32:
    total = np.float32(0.0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@compiled
def _norm(values: Array, weight: Array, eps: np.float32, made: Array) -> None:
    """RMSNorm of every row."""
    wide = values.shape[1]
    for t in range(len(values)):
        scale = _ONE / np.sqrt(_energy(values[t]) / np.float32(wide) + eps)
        for i in range(wide):
            made[t, i] = values[t, i] * scale * weight[i]


@compiled
def _turn(
    values: Any, weight: Array, eps: np.float32, cos: Array, sin: Array, turned: Any
) -> None:  # fmt: skip
    """`[tokens, heads, head_dim]` normed and turned into `[heads, tokens, head_dim]`."""
    tokens, heads, wide = values.shape
    half = wide // 2
    row, out = np.empty(wide, np.float32), np.empty(wide, np.float32)
    for t in range(tokens):
        for h in range(heads):
            bring(values[t, h], row)
            scale = _ONE / np.sqrt(_energy(row) / np.float32(wide) + eps)
            for i in range(wide):
                row[i] = row[i] * scale * weight[i]
            for i in range(half):
                first, second = row[i], row[i + half]
                out[i] = first * cos[t, i] - second * sin[t, i]
                out[i + half] = second * cos[t, i] + first * sin[t, i]
            keep(out, turned[h, t])


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
    """RMSNorm of every head, then the rotary embedding: `[batch, tokens, heads, head_dim]` to `[batch, heads, tokens,
    head_dim]`, both bf16 or fp32; `weight` `[head_dim]`, `cos` and `sin` `[tokens, head_dim / 2]` in fp32.

    As `rms_norm` and `rotate` of `model.block` in fp32, but for the order in which squares are added.
    """
    batch, tokens, heads, wide = x.shape
    turned = torch.empty(batch, heads, tokens, wide, dtype=x.dtype)
    tables = [np.ascontiguousarray(table.numpy(), np.float32) for table in (weight, cos, sin)]
    for row in range(batch):
        _turn(numbers_of(x[row]), tables[0], np.float32(eps), tables[1], tables[2], numbers_of(turned[row]))
    return turned


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, all in fp32; as `rms_norm` of `model.block`, but for the order in which squares are
    added."""
    made, wide = torch.empty(x.shape), x.shape[-1]
    rows = x.contiguous().view(-1, wide).numpy()
    _norm(rows, weight.contiguous().numpy(), np.float32(eps), made.view(-1, wide).numpy())
    return made


def add_rows(x: Tensor, sums: Tensor) -> None:
    """Add the rows of a bf16 `[tokens, n]` to the fp32 `sums` `[n]`."""
    _add(halves_of(x), sums.numpy())


def halves_of(tensor: Tensor) -> Any:
    """A bf16 tensor's numbers as uint16; a copy only where it does not lie in one piece."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def numbers_of(tensor: Tensor) -> Any:
    """An fp32 tensor's numbers, or a bf16 tensor's as `halves_of` does."""
    return tensor.contiguous().numpy() if tensor.dtype == torch.float32 else halves_of(tensor)
