"""Rounding to nearest, compiled: range, scale and codes in one pass.

A tile holds the columns of a few rows, `[columns, rows]`, so that every step is one operation on all rows at once:
bounds, a scale for each range that is tried, the errors of rounding onto it. Every operation is that of `range_grid`,
`round_scale` and `round_to` in `rounding.grid`, in fp32 and in the same order. Only the errors by which ranges are
compared are computed differently: in units of the scale, and summed in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model.compiled import ROUNDER, Array, compiled, contracted
from qwen3_export.model.tiles import TILE, load

SYMMETRIC, SIGNED, ASYMMETRIC = 0, 1, 2
_SIGN = np.uint32(1 << 31)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Squares of so many columns are added in fp32; these sums are added in fp64.
_COLUMNS = 128

# The state of a tile's rows, one line per quantity: bounds, the range being tried, its error, the best range so far.
_LOW, _HIGH, _FACTOR, _SCALE, _ZEROS, _TOTAL, _INVERSE, _LOWEST, _HIGHEST, _LEAST, _KEPT = range(11)
_LINES = _KEPT + 2

Numbers = NDArray[np.int64]
Bits = NDArray[np.uint32]
# How many bits of fp32's mantissa a scale's type lacks; the least and the largest scale.
Storage = tuple[int, np.float32, np.float32]


@compiled
def code_of(value: np.float32, scale: np.float32, zero: np.float32, largest: np.float32) -> np.float32:
    """`clamp(round(value / scale) + zero, 0, largest)`.

    The rounding is wrong for very large numbers, which are clamped anyway.
    """
    code = ((value / scale) + ROUNDER) - ROUNDER + zero
    code = code if code > _ZERO else _ZERO
    return code if code < largest else largest


@compiled
def _bounds(work: Array, low: Array, high: Array) -> None:
    """Least and largest weight of every row; columns added as padding count as zeros."""
    # A loop: numba would compile the message of a wrong shape for an assignment, which takes 3 s.
    for r in range(TILE):
        low[r] = high[r] = work[0, r]
    for j in range(0, len(work), 4):
        for r in range(TILE):
            a, b, c, d = work[j, r], work[j + 1, r], work[j + 2, r], work[j + 3, r]
            less, more = (a, b) if a < b else (b, a)
            least, most = (c, d) if c < d else (d, c)
            less, more = less if less < least else least, more if more > most else most
            low[r] = less if less < low[r] else low[r]
            high[r] = more if more > high[r] else high[r]


@compiled
def _to_storage(scale: Array, bits: Bits, storage: Storage) -> None:
    """Round scales to their storage type, half to even, and clamp to its range."""
    dropped, smallest, largest = storage
    for r in range(TILE):
        sign, size = bits[r] & _SIGN, abs(scale[r])
        size = size if size > smallest else smallest
        scale[r] = size if size < largest else largest
        bits[r] |= sign
    if dropped:
        cut, one = np.uint32(dropped), np.uint32(1)
        half = (one << (cut - one)) - one
        for r in range(TILE):
            bits[r] = ((bits[r] + half + ((bits[r] >> cut) & one)) >> cut) << cut


@compiled
def _make_scales(kind: int, top: np.float32, storage: Storage, lines: Array, bits: Bits) -> None:
    """Scales and zero points of the range that is tried.

    `bits` are the scales' bits.
    """
    low, high, factor, scale, zero = lines[_LOW], lines[_HIGH], lines[_FACTOR], lines[_SCALE], lines[_ZEROS]
    if kind == ASYMMETRIC:
        for r in range(TILE):
            below = (low[r] if low[r] < _ZERO else _ZERO) * factor[r]
            above = (high[r] if high[r] > _ZERO else _ZERO) * factor[r]
            zero[r], scale[r] = -below, (above - below) / top
    else:
        for r in range(TILE):
            largest = low[r] if -low[r] > high[r] else high[r]
            scale[r] = (abs(largest) if kind == SYMMETRIC else largest) * factor[r]
    _to_storage(scale, bits, storage)
    if kind == ASYMMETRIC:
        for r in range(TILE):
            zero[r] = code_of(zero[r], scale[r], _ZERO, top)


@contracted
def _errors(work: Array, weights: Array, top: np.float32, lines: Array) -> None:
    """Every row's Σ importance · (w / s − code + z)² · s²."""
    scale, zero, total = lines[_SCALE], lines[_ZEROS], lines[_TOTAL]
    inverse, lowest, highest = lines[_INVERSE], lines[_LOWEST], lines[_HIGHEST]
    for r in range(TILE):
        inverse[r] = _ONE / scale[r]
        lowest[r], highest[r] = -zero[r], top - zero[r]
    total[:] = _ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            part = _ZERO
            for k in range(4):
                unit = work[j + k, r] * inverse[r]
                code = np.rint(unit)
                code = code if code > lowest[r] else lowest[r]
                code = code if code < highest[r] else highest[r]
                miss = unit - code
                part += weights[j + k] * (miss * miss)
            total[r] += part
    for r in range(TILE):
        total[r] *= scale[r] * scale[r]


@compiled
def _round(work: Array, kept: Array, top: np.float32, here: int, sums: NDArray[np.float64]) -> None:
    """Round a tile's weights to codes, and add to Σ δ² and Σ w²."""
    part = np.zeros((2, TILE), np.float32)
    for begin in range(0, len(work), _COLUMNS):
        part[:] = _ZERO
        for j in range(begin, min(begin + _COLUMNS, len(work))):
            for r in range(TILE):
                value = work[j, r]
                code = code_of(value, kept[0, r], kept[1, r], top)
                miss = (code - kept[1, r]) * kept[0, r] - value
                part[0, r] += miss * miss
                part[1, r] += value * value
                work[j, r] = code
        for r in range(here):
            sums[0, r] += part[0, r]
            sums[1, r] += part[1, r]


@compiled
def _keep(lines: Array, number: Numbers, best: Numbers, first: bool) -> None:
    """Keep the range just tried in those rows where its error is less."""
    scale, zero, total = lines[_SCALE], lines[_ZEROS], lines[_TOTAL]
    least, kept_scale, kept_zero = lines[_LEAST], lines[_KEPT], lines[_KEPT + 1]
    for r in range(TILE):
        if first or total[r] < least[r]:
            least[r], best[r] = total[r], number[r]
            kept_scale[r], kept_zero[r] = scale[r], zero[r]


@compiled
def _search(
    work: Array, weights: Array, kind: int, factors: Array, order: Numbers, top: np.float32, storage: Storage,
    lines: Array,
) -> None:  # fmt: skip
    """Leave the best range's scales and zero points in `lines`.

    The ranges of `order` are tried first, then the neighbours of the best.
    """
    number, best, middle = np.zeros(TILE, np.int64), np.zeros(TILE, np.int64), np.zeros(TILE, np.int64)
    coarse = len(order)
    for turn in range(coarse + 2 if 1 < coarse < len(factors) else coarse):
        if turn == coarse:
            for r in range(TILE):
                middle[r] = best[r]
        for r in range(TILE):
            beside = middle[r] + (1 if turn > coarse else -1)
            number[r] = order[turn] if turn < coarse else min(max(beside, 0), len(factors) - 1)
            lines[_FACTOR, r] = factors[number[r]]
        _make_scales(kind, top, storage, lines, lines.view(np.uint32)[_SCALE])
        if coarse > 1:
            _errors(work, weights, top, lines)
        _keep(lines, number, best, turn == 0)


@compiled
def round_groups(
    words: Any, shift: int, length: int, importance: Array, kind: int, factors: Array, order: Numbers,
    top: np.float32, storage: Storage, scales: Array, zeros: Array, codes: NDArray[np.uint8],
) -> tuple[float, float]:  # fmt: skip
    """Find each group's scale and zero point, and round onto them.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `length` weights in a row
    share a scale; `importance` `[in]` weighs their errors. `factors` are shares of the range, the largest first. Those
    that `order` names are tried in that order, then the neighbours of the best one unless all have been tried; the
    first of least error is kept. A single factor is used without trying. `top` is the largest code; `zeros` holds the
    midpoint when the function is called. If `codes` has no rows, scales are found but nothing is rounded. Returns Σ δ²
    and Σ w².
    """
    wide = -(-length // 4) * 4
    work, weights = np.zeros((wide, TILE), np.float32), np.zeros(wide, np.float32)
    lines = np.zeros((_LINES, TILE), np.float32)
    bits, sums = work.view(np.uint32), np.zeros((2, TILE), np.float64)
    lines[_ZEROS] = zeros[0, 0]
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for group in range(scales.shape[1]):
            column = group * length
            load(words, shift, row, column, length, bits)
            for j in range(length):
                weights[j] = importance[column + j]
            _bounds(work, lines[_LOW], lines[_HIGH])
            _search(work, weights, kind, factors, order, top, storage, lines)
            for r in range(here):
                scales[row + r, group], zeros[row + r, group] = lines[_KEPT, r], lines[_KEPT + 1, r]
            if len(codes):
                _round(work[:length], lines[_KEPT:], top, here, sums)
                for r in range(here):
                    target = codes[row + r, column : column + length]
                    for j in range(length):
                        # Converted through int32, for which the processor has an instruction.
                        target[j] = np.uint8(np.int32(work[j, r]))
    return sums[0].sum(), sums[1].sum()
