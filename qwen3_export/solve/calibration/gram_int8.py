"""Gram sums of inputs rounded to bytes, added up without error.

They take half the time of sums in 16 bits. "Row" stands for the tokens of one sample here.

    d = x − c          c is about the mean of the row's tokens, one number per column
    b = round(d / s)   s is the largest |d| of some rows divided by 127, one number per column

    Σ x̂ x̂ᵀ = s Σ b bᵀ s + c (Σ d̂)ᵀ + (Σ d̂) cᵀ + n c cᵀ      d̂ = s b,  x̂ = c + d̂

Integers are added without rounding. So the result is the exact sum over slightly rounded inputs, and always positive
semidefinite, even where the inputs have much in common. Rounding adds s² / 12 to a column's mean square. Where the
largest input is ten times the usual one, that is less than a thousandth; damping adds a hundredth. Rows in fp32 are
rounded with 63 in place of 127 and kept in panels for AVX2 (`gram_avx2`), where the error is four times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.model.compiled import ROUNDER, Array, compiled
from qwen3_export.model.passes import Halves, Numbers, add_rows, expand, halves_of, numbers_of
from qwen3_export.solve.calibration import gram_avx2

# Every so many tokens of a row are averaged to find its center.
_EVERY = 8
# Tokens are padded with zeros to a multiple of this, since torch makes a kernel for every number of tokens.
_FILLED = 512
_LARGEST = np.float32(127.0)
# Products of so many tokens, at most 127² each, fit into an integer of 32 bits.
_SUMMED = 1 << 17


@compiled
def _reach(rows: Numbers, center: Array, most: Array) -> None:
    """`most = max(most, |x − c|)`, NaN where an input is not finite."""
    row, bad = np.empty(rows.shape[1], np.float32), np.zeros(rows.shape[1], np.float32)
    bits = row.view(np.uint32)
    for t in range(len(rows)):
        expand(rows[t], bits)
        for i in range(len(row)):
            size = abs(row[i] - center[i])
            most[i] = size if size > most[i] else most[i]
            bad[i] += size - size
    for i in range(len(row)):
        most[i] += bad[i]


@compiled
def _round(halves: Halves, center: Array, inverse: Array, made: Any, sums: Array) -> None:
    """`made = round((x − c) · inverse)`, and its sum over the tokens."""
    row, total = np.empty(halves.shape[1], np.float32), np.zeros(halves.shape[1], np.float32)
    bits, integers = row.view(np.uint32), row.view(np.int32)
    for t in range(len(halves)):
        expand(halves[t], bits)
        for i in range(len(row)):
            row[i] = (row[i] - center[i]) * inverse[i] + ROUNDER
        for i in range(len(row)):
            made[t, i] = np.int8(integers[i] & 255)
        for i in range(len(row)):
            total[i] += row[i] - ROUNDER
    for i in range(len(row)):
        sums[i] = total[i]


@compiled
def _add_scaled(total: Array, begin: int, products: NDArray[np.int32], left: Array, right: Array) -> None:
    """`total[:, begin:] += left · products · right`."""
    for i in range(len(products)):
        for j in range(len(right)):
            total[i, begin + j] += np.float32(products[i, j]) * left[i] * right[j]


@dataclass(frozen=True)
class Panels:
    """Inputs in the panels that `gram_avx2` multiplies, and the sums of their columns.

    The sums are int32 `[n]`, padded to whole panels.
    """

    values: NDArray[np.uint8]
    totals: NDArray[np.int32]


@dataclass(frozen=True)
class Bytes:
    """Inputs `[tokens, n]` as bytes, each row's center subtracted, with a scale per column.

    `centers` and `sums` are `[rows, n]`. `sums` are Σ d̂ over a row's tokens; for rows without a center they are Σ x of
    the unrounded inputs.
    """

    values: Tensor | Panels
    scales: Tensor
    centers: Tensor
    sums: Tensor


def as_bytes(parts: Sequence[Tensor], centered: bool) -> Bytes:
    """bf16 rows `[tokens, n]` as bytes, fp32 rows as panels.

    If an input is not finite, its column's scale is not finite either.
    """
    size = parts[0].shape[1]
    centers = torch.zeros(len(parts), size)
    most = np.zeros(size, np.float32)
    for part, center in zip(parts, centers, strict=True):
        if centered and len(part):
            # The first token is left out: its inputs may be a thousand times as large as all others.
            some = part[min(len(part) - 1, _EVERY // 2) :: _EVERY]
            center.copy_(_sum(some)).div_(len(some))
        _reach(numbers_of(part), center.numpy(), most)
    in_panels = parts[0].dtype == torch.float32
    scales = most / (np.float32(gram_avx2.LARGEST) if in_panels else _LARGEST)
    inverse = np.divide(np.float32(1.0), scales, out=np.zeros_like(scales), where=(scales > 0) & np.isfinite(scales))
    values, sums = (_as_panels if in_panels else _as_matrix)(parts, centers, inverse)
    sums = sums.mul_(torch.from_numpy(scales)) if centered else torch.stack([_sum(part) for part in parts])
    return Bytes(values, torch.from_numpy(scales), centers, sums)


def _as_matrix(parts: Sequence[Tensor], centers: Tensor, inverse: Array) -> tuple[Tensor, Tensor]:
    """Bytes `[tokens, n]`, padded with zeros, and their sums in each part."""
    tokens, sums = sum(map(len, parts)), torch.zeros(centers.shape)
    values = torch.empty(-(-tokens // _FILLED) * _FILLED, centers.shape[1], dtype=torch.int8)
    values[tokens:] = 0
    places = torch.split(values[:tokens], [len(part) for part in parts])
    for part, center, total, made in zip(parts, centers, sums, places, strict=True):
        _round(halves_of(part), center.numpy(), inverse, made.numpy(), total.numpy())
    return values, sums


def _as_panels(parts: Sequence[Tensor], centers: Tensor, inverse: Array) -> tuple[Panels, Tensor]:
    """As `_as_matrix`, in panels."""
    tokens, size = sum(map(len, parts)), centers.shape[1]
    if tokens > gram_avx2.MOST_TOKENS:
        raise ValueError(f"{tokens} tokens at once are more than {gram_avx2.MOST_TOKENS}")
    count = -(-size // gram_avx2.PANEL)
    shape = (-(-tokens // gram_avx2.BLOCK), count, gram_avx2.BLOCK // 4, gram_avx2.PANEL, 4)
    values = torch.full(shape, gram_avx2.ZERO, dtype=torch.uint8).numpy()
    totals, place = np.zeros((len(parts), count * gram_avx2.PANEL), np.int32), 0
    for part, center, total in zip(parts, centers, totals, strict=True):
        gram_avx2.put(part.contiguous().numpy(), center.numpy(), inverse, place, values.view(np.int32)[..., 0], total)
        place += len(part)
    return Panels(values, totals.sum(0, dtype=np.int32)), torch.from_numpy(totals[:, :size].astype(np.float32))


def _sum(rows: Tensor) -> Tensor:
    """Σ of rows `[tokens, n]`, in fp32."""
    total = torch.zeros(rows.shape[1])
    if rows.dtype == torch.float32:
        return torch.sum(rows, 0, out=total)
    add_rows(rows, total)
    return total


def add_products(total: Tensor, left: Bytes, right: Bytes, rows: slice, columns: slice) -> None:
    """`total[rows, columns] += Σ left rightᵀ` over the tokens of both; `total` in fp32."""
    scales = [some.numpy() for some in (left.scales[rows], right.scales[columns])]
    if isinstance(left.values, Panels) and isinstance(right.values, Panels):
        offset, sums = gram_avx2.multiply(left.values.values, right.values.values, rows.stop, columns)
        totals = right.values.totals[columns]
        gram_avx2.add_scaled(total[rows].numpy(), columns.start, sums[rows], offset, totals, *scales)
        return
    assert isinstance(left.values, Tensor)
    assert isinstance(right.values, Tensor)
    for first, second in zip(torch.split(left.values, _SUMMED), torch.split(right.values, _SUMMED), strict=True):
        products = torch._int_mm(first[:, rows].T, second[:, columns])
        _add_scaled(total[rows].numpy(), columns.start, products.numpy(), *scales)
