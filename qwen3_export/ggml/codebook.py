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

from qwen3_export.ggml.grids import Book, cell
from qwen3_export.ggml.scale_fit import (
    CODE,
    LINES,
    PEAK,
    SCALE,
    begin_choice,
    errors,
    keep_least,
    search,
    store_half,
)
from qwen3_export.ggml.super_fit import settle
from qwen3_export.ggml.tiles import ONE, ZERO, add_errors, effort_for, store_codes
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE, load


@compiled
def _round(work: Array, scale: Array, book: Book, here: int, sums: NDArray[np.float64]) -> None:
    """Round a group's weights to codes, and add what that costs to `sums`."""
    table, numbers, fine = book
    for r in range(TILE):
        inverse = ONE / scale[r] if scale[r] != ZERO else ZERO
        missed, whole, furthest, largest = ZERO, ZERO, ZERO, ZERO
        for j in range(len(work)):
            x = work[j, r]
            place = cell(x * inverse, fine, len(table))
            miss = abs(scale[r] * table[place] - x)
            missed += miss * miss
            whole += x * x
            furthest, largest = max(furthest, miss), max(largest, abs(x))
            work[j, r] = np.float32(numbers[place])
        if r < here:
            add_errors(sums, missed, whole, furthest, largest)


@compiled
def round_super(
    words: Any, shift: int, importance: Array, quick: bool, book: Book, limit: np.float32, ends: Array,
    values: Array, codes: NDArray[np.uint8], scales: NDArray[np.int8], super_scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto iq4_xs.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    supers, chosen = np.zeros(TILE, np.float32), np.zeros((9, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            weights = importance[256 * block : 256 * block + 256]
            effort = effort_for(weights, quick)
            settle(work, weights, book, limit, ends, values, effort, lines, supers, chosen)
            for g in range(8):
                part = work[32 * g : 32 * g + 32]
                for r in range(TILE):
                    lines[SCALE, r] = chosen[g, r] * supers[r]
                _round(part, lines[SCALE], book, here, sums)
                for r in range(here):
                    scales[row + r, block * 8 + g] = np.int8(chosen[g, r])
            for r in range(here):
                super_scales[row + r, block] = supers[r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, importance: Array, quick: bool, book: Book, ends: Array, values: Array,
    codes: NDArray[np.uint8], scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto iq4_nl, whose scales are fp16; returns as `round_super` does."""
    work, lines = np.zeros((32, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    sums, bits, kept = np.zeros(4, np.float64), work.view(np.uint32), np.zeros((2, TILE), np.float32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for g in range(scales.shape[1]):
            load(words, shift, row, 32 * g, 32, bits)
            weights = importance[32 * g : 32 * g + 32]
            effort = effort_for(weights, quick)
            search(work, weights, book, ends, values, effort, lines)
            store_half(work, weights, book, effort, lines, kept)
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
                errors(work, weights, book, lines)
                keep_least(CODE, lines, kept)
            for r in range(TILE):
                lines[SCALE, r] = np.float32(2.0) ** kept[0, r]
            _round(work, lines[SCALE], book, here, sums)
            for r in range(here):
                exponents[row + r, g] = np.uint8(np.int32(kept[0, r]) + 127)
            store_codes(codes, work, row, 32 * g, here)
    return sums
