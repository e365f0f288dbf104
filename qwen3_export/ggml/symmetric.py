"""Rounding onto scale · (code − midpoint).

q3_k and q6_k have a super scale, q4_0, q5_0 and q2_0 an fp16 scale.

    per group     try scales that bring the largest weight near either end of the codes; for each, round to codes,
                  then fit the scale by least squares on Σ w (scale · code − x)²; round and fit the best twice more
    super-block   fit super_scale to the groups' scales, weighed by the cost of an error
    per group     try the integers next to scale / super_scale, keep the one of least error

w is the importance of the input, 1 without one. q8_0 is rounded as llama.cpp's converter does it: the largest weight
becomes 127.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ggml.scale_fit import (
    ERROR,
    INVERSE,
    LINES,
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


@contracted
def _attempt(work: Array, weights: Array, middle: np.float32, lines: Array) -> None:
    """Round for `INVERSE`, and sum up what the least-squares fit needs."""
    inverse, wxv, wvv = lines[INVERSE], lines[WXV], lines[WVV]
    low, high = -middle, middle - ONE
    for r in range(TILE):
        wxv[r], wvv[r] = ZERO, ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            first, second = ZERO, ZERO
            for k in range(4):
                x = work[j + k, r]
                code = np.rint(x * inverse[r])
                code = code if code > low else low
                code = code if code < high else high
                weighed = weights[j + k] * code
                first += weighed * x
                second += weighed * code
            wxv[r] += first
            wvv[r] += second


@compiled
def _search(work: Array, weights: Array, middle: np.float32, ends: Array, lines: Array) -> None:
    """Leave the best scale of a group in `lines`, and Σ w code².

    `ends` are the values to try for the largest weight.
    """
    find_peak(work, lines)
    for end in ends:
        try_end(end, lines)
        _attempt(work, weights, middle, lines)
        keep_fit(lines)
    for _ in range(2):
        try_best(lines)
        _attempt(work, weights, middle, lines)
        keep_fit(lines)


@contracted
def _errors(work: Array, weights: Array, middle: np.float32, lines: Array) -> None:
    """Σ w (scale · code − x)² of `SCALE` with the nearest codes."""
    scale, inverse, error = lines[SCALE], lines[INVERSE], lines[ERROR]
    low, high = -middle, middle - ONE
    for r in range(TILE):
        inverse[r] = ONE / scale[r] if scale[r] != ZERO else ZERO
        error[r] = ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            part = ZERO
            for k in range(4):
                x = work[j + k, r]
                code = np.rint(x * inverse[r])
                code = code if code > low else low
                code = code if code < high else high
                miss = scale[r] * code - x
                part += weights[j + k] * (miss * miss)
            error[r] += part


@compiled
def _choose(
    work: Array, weights: Array, middle: np.float32, supers: Array, limit: np.float32, near: Array, lines: Array,
    kept: Array,
) -> None:  # fmt: skip
    """Choose the integer scale of a group with the least error.

    It is left in `kept` [0], its error in [1]; `near` is the ideal scale.
    """
    begin_choice(kept)
    for step in range(-1, 2):
        try_integer(near, step, supers, limit, lines)
        _errors(work, weights, middle, lines)
        keep_least(lines, kept)


@compiled
def _round(work: Array, scale: Array, middle: np.float32, here: int, sums: NDArray[np.float64]) -> None:
    """Round a group's weights to unsigned codes, and add what that costs to `sums`."""
    for r in range(TILE):
        inverse = ONE / scale[r] if scale[r] != ZERO else ZERO
        missed, whole, furthest, largest = ZERO, ZERO, ZERO, ZERO
        for j in range(len(work)):
            x = work[j, r]
            code = min(max(np.rint(x * inverse), -middle), middle - ONE)
            miss = abs(scale[r] * code - x)
            missed += miss * miss
            whole += x * x
            furthest, largest = max(furthest, miss), max(largest, abs(x))
            work[j, r] = code + middle
        if r < here:
            add_errors(sums, missed, whole, furthest, largest)


@compiled
def round_super(
    words: Any, shift: int, group: int, importance: Array, middle: np.float32, limit: np.float32, ends: Array,
    codes: NDArray[np.uint8], scales: NDArray[np.int8], super_scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q3_k or q6_k.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    per_block = 256 // group
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    found, weighs = np.zeros((per_block, TILE), np.float32), np.zeros((per_block, TILE), np.float32)
    supers, kept = np.zeros(TILE, np.float32), np.zeros((2, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            for g in range(per_block):
                weights = importance[256 * block + g * group : 256 * block + (g + 1) * group]
                _search(work[g * group : (g + 1) * group], weights, middle, ends, lines)
                found[g], weighs[g] = lines[SCALE], lines[WVV]
            for r in range(TILE):
                supers[r] = super_scale(found, weighs, r, -limit, limit - ONE)
            for g in range(per_block):
                part = work[g * group : (g + 1) * group]
                weights = importance[256 * block + g * group : 256 * block + (g + 1) * group]
                _choose(part, weights, middle, supers, limit, found[g], lines, kept)
                for r in range(TILE):
                    lines[SCALE, r] = kept[0, r] * supers[r]
                _round(part, lines[SCALE], middle, here, sums)
                for r in range(here):
                    scales[row + r, block * per_block + g] = np.int8(kept[0, r])
            for r in range(here):
                super_scales[row + r, block] = supers[r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, group: int, importance: Array, middle: np.float32, ends: Array, codes: NDArray[np.uint8],
    scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q4_0, q5_0 or q2_0, whose scales are fp16.

    Returns as `round_super` does.
    """
    work, lines = np.zeros((group, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for g in range(scales.shape[1]):
            load(words, shift, row, group * g, group, bits)
            _search(work, importance[group * g : group * g + group], middle, ends, lines)
            for r in range(TILE):
                lines[SCALE, r] = half(lines[SCALE, r])
            _round(work, lines[SCALE], middle, here, sums)
            for r in range(here):
                scales[row + r, g] = lines[SCALE, r]
            store_codes(codes, work, row, group * g, here)
    return sums


@compiled
def round_q8_0(words: Any, shift: int, codes: NDArray[np.uint8], scales: Array) -> NDArray[np.float64]:
    """Round rows of weights onto q8_0 as ggml's reference does, halves away from zero.

    The scales are left in fp32; the caller rounds them half to even. Returns as `round_super` does.
    """
    row_bits, sums = np.zeros(32, np.uint32), np.zeros(4, np.float64)
    row = row_bits.view(np.float32)
    for i in range(len(words)):
        for g in range(scales.shape[1]):
            source, target = words[i, 32 * g : 32 * g + 32], codes[i, 32 * g : 32 * g + 32]
            peak = ZERO
            for j in range(32):
                row_bits[j] = np.uint32(source[j]) << shift
                peak = max(peak, abs(row[j]))
            step = peak / np.float32(127.0)
            inverse = ONE / step if step > ZERO else ZERO
            stored = half(step)
            missed, whole, furthest = ZERO, ZERO, ZERO
            for j in range(32):
                unit = row[j] * inverse
                whole_part = np.floor(abs(unit))
                size = whole_part + np.floor(np.float32(2.0) * (abs(unit) - whole_part))
                code = size if unit > ZERO else -size
                miss = abs(stored * code - row[j])
                missed += miss * miss
                whole += row[j] * row[j]
                furthest = max(furthest, miss)
                target[j] = np.uint8(np.int32(code + np.float32(128.0)))
            scales[i, g] = step
            add_errors(sums, missed, whole, furthest, peak)
    return sums
