"""Rounding onto codes that stand for sixteen given numbers.

The types are iq4_nl, iq4_xs under a super scale, and mxfp4.

    iq4     try scales that bring the largest weight near either end of the numbers; for each, take the nearest
            numbers, then fit the scale by least squares on Σ w (scale · value − x)²; fit the best once more;
            iq4_xs goes on with a super scale and integers below it, as `symmetric` does
    mxfp4   try three powers of two, keep the one with the least Σ w (scale · value − x)²

w is the importance of the input, 1 without one. The points halfway between two numbers are multiples of 1 / `fine`.
So a table with one entry per interval of that width gives the number nearest to any weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ggml.scale_fit import (
    CODE,
    ERROR,
    INVERSE,
    LINES,
    PEAK,
    SCALE,
    WVV,
    WXV,
    begin_choice,
    find_peak,
    keep_fit,
    keep_least,
    try_best,
    try_end,
    try_integer,
)
from qwen3_export.ggml.tiles import ONE, ZERO, add_errors, half, store_codes, super_scale
from qwen3_export.model.compiled import Array, compiled, contracted
from qwen3_export.model.tiles import TILE, load

# The table: the nearest number of every interval, its code, and `fine`.
Book = tuple[Array, NDArray[np.uint8], np.float32]


@compiled
def _cell(unit: np.float32, fine: np.float32, cells: int) -> Any:
    """The table's entry for a weight in units of the scale."""
    place = unit * fine + np.float32(cells // 2)
    place = place if place > ZERO else ZERO
    return np.int32(min(place, np.float32(cells - 1)))


@contracted
def _attempt(work: Array, weights: Array, book: Book, lines: Array) -> None:
    """Take the nearest values for `INVERSE`, and sum up what the fit needs."""
    (table, _, fine), inverse, wxv, wvv = book, lines[INVERSE], lines[WXV], lines[WVV]
    for r in range(TILE):
        wxv[r], wvv[r] = ZERO, ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            first, second = ZERO, ZERO
            for k in range(4):
                x = work[j + k, r]
                value = table[_cell(x * inverse[r], fine, len(table))]
                weighed = weights[j + k] * value
                first += weighed * x
                second += weighed * value
            wxv[r] += first
            wvv[r] += second


@compiled
def _search(work: Array, weights: Array, book: Book, ends: Array, lines: Array) -> None:
    """Leave the best scale of a group in `lines`, and Σ w value².

    `ends` are the values to try for the largest weight.
    """
    find_peak(work, lines)
    for end in ends:
        try_end(end, lines)
        _attempt(work, weights, book, lines)
        keep_fit(lines)
    try_best(lines)
    _attempt(work, weights, book, lines)
    keep_fit(lines)


@contracted
def _errors(work: Array, weights: Array, book: Book, lines: Array) -> None:
    """Σ w (scale · value − x)² of `SCALE` with the nearest values."""
    (table, _, fine), scale, inverse, error = book, lines[SCALE], lines[INVERSE], lines[ERROR]
    for r in range(TILE):
        inverse[r] = ONE / scale[r] if scale[r] != ZERO else ZERO
        error[r] = ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            part = ZERO
            for k in range(4):
                x = work[j + k, r]
                miss = scale[r] * table[_cell(x * inverse[r], fine, len(table))] - x
                part += weights[j + k] * (miss * miss)
            error[r] += part


@compiled
def _choose(
    work: Array, weights: Array, book: Book, supers: Array, limit: np.float32, near: Array,
    lines: Array, kept: Array,
) -> None:  # fmt: skip
    """Choose the integer scale of a group with the least error.

    It is left in `kept` [0], its error in [1]; `near` is the ideal scale.
    """
    begin_choice(kept)
    for step in range(-1, 2):
        try_integer(near, step, supers, limit, lines)
        _errors(work, weights, book, lines)
        keep_least(lines, kept)


@compiled
def _round(work: Array, scale: Array, book: Book, here: int, sums: NDArray[np.float64]) -> None:
    """Round a group's weights to codes, and add what that costs to `sums`."""
    table, numbers, fine = book
    for r in range(TILE):
        inverse = ONE / scale[r] if scale[r] != ZERO else ZERO
        missed, whole, furthest, largest = ZERO, ZERO, ZERO, ZERO
        for j in range(len(work)):
            x = work[j, r]
            cell = _cell(x * inverse, fine, len(table))
            miss = abs(scale[r] * table[cell] - x)
            missed += miss * miss
            whole += x * x
            furthest, largest = max(furthest, miss), max(largest, abs(x))
            work[j, r] = np.float32(numbers[cell])
        if r < here:
            add_errors(sums, missed, whole, furthest, largest)


@compiled
def round_super(
    words: Any, shift: int, importance: Array, book: Book, limit: np.float32, ends: Array,
    codes: NDArray[np.uint8], scales: NDArray[np.int8], super_scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto iq4_xs.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    found, weighs = np.zeros((8, TILE), np.float32), np.zeros((8, TILE), np.float32)
    supers, kept = np.zeros(TILE, np.float32), np.zeros((2, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            for g in range(8):
                weights = importance[256 * block + 32 * g : 256 * block + 32 * g + 32]
                _search(work[32 * g : 32 * g + 32], weights, book, ends, lines)
                found[g], weighs[g] = lines[SCALE], lines[WVV]
            for r in range(TILE):
                supers[r] = super_scale(found, weighs, r, -limit, limit - ONE)
            for g in range(8):
                part = work[32 * g : 32 * g + 32]
                weights = importance[256 * block + 32 * g : 256 * block + 32 * g + 32]
                _choose(part, weights, book, supers, limit, found[g], lines, kept)
                for r in range(TILE):
                    lines[SCALE, r] = kept[0, r] * supers[r]
                _round(part, lines[SCALE], book, here, sums)
                for r in range(here):
                    scales[row + r, block * 8 + g] = np.int8(kept[0, r])
            for r in range(here):
                super_scales[row + r, block] = supers[r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, importance: Array, book: Book, ends: Array, codes: NDArray[np.uint8],
    scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto iq4_nl, whose scales are fp16; returns as `round_super` does."""
    work, lines = np.zeros((32, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for g in range(scales.shape[1]):
            load(words, shift, row, 32 * g, 32, bits)
            _search(work, importance[32 * g : 32 * g + 32], book, ends, lines)
            for r in range(TILE):
                lines[SCALE, r] = half(lines[SCALE, r])
            _round(work, lines[SCALE], book, here, sums)
            for r in range(here):
                scales[row + r, g] = lines[SCALE, r]
            store_codes(codes, work, row, 32 * g, here)
    return sums


@compiled
def round_powers(
    words: Any, shift: int, importance: Array, book: Book, codes: NDArray[np.uint8],
    exponents: NDArray[np.uint8],
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto mxfp4, whose scales are 2 ** (exponent − 127).

    Returns as `round_super` does.
    """
    work, lines = np.zeros((32, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    sums, bits, kept = np.zeros(4, np.float64), work.view(np.uint32), np.zeros((2, TILE), np.float32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for g in range(exponents.shape[1]):
            load(words, shift, row, 32 * g, 32, bits)
            weights = importance[32 * g : 32 * g + 32]
            for r in range(TILE):
                peak = ZERO
                for j in range(32):
                    peak = max(peak, abs(work[j, r]))
                lines[PEAK, r] = np.floor(np.log2(peak)) - np.float32(2.0) if peak > ZERO else np.float32(-127.0)
            begin_choice(kept)
            for step in range(-1, 2):
                for r in range(TILE):
                    power = min(max(lines[PEAK, r] + np.float32(step), np.float32(-126.0)), np.float32(125.0))
                    lines[CODE, r], lines[SCALE, r] = power, np.float32(2.0) ** power
                _errors(work, weights, book, lines)
                keep_least(lines, kept)
            for r in range(TILE):
                lines[SCALE, r] = np.float32(2.0) ** kept[0, r]
            _round(work, lines[SCALE], book, here, sums)
            for r in range(here):
                exponents[row + r, g] = np.uint8(np.int32(kept[0, r]) + 127)
            store_codes(codes, work, row, 32 * g, here)
    return sums
