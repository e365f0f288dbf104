"""Rounding onto scale · (code − midpoint).

q3_k and q6_k have a super scale, q4_0, q5_0 and q2_0 an fp16 scale.

    per group     try scales that bring the largest weight near either end of the codes; for each, round to codes,
                  then fit the scale by least squares on Σ w (scale · code − x)²; round and fit the best twice more
    super-block   fit super_scale to the groups' scales, weighed by the cost of an error
    per group     try the integers next to scale / super_scale, keep the one of least error

w is the importance of the input, 1 without one. Where importance differs between inputs, more scales are tried, and
super scales are fitted once more to the codes; where a few inputs have most of it, other ones are tried, too.

q8_0 is rounded as llama.cpp's converter does it: the largest weight becomes 127.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ggml.scale_fit import LINES, SCALE, search, store_half
from qwen3_export.ggml.super_fit import settle
from qwen3_export.ggml.tiles import DIFFERENT, ONE, ZERO, add_errors, effort_for, half, store_codes
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE, load


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
    words: Any, shift: int, group: int, importance: Array, quick: bool, middle: np.float32, limit: np.float32,
    ends: Array, codes: NDArray[np.uint8], scales: NDArray[np.int8], super_scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q3_k or q6_k.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    per_block = 256 // group
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    supers, chosen = np.zeros(TILE, np.float32), np.zeros((per_block + 1, TILE), np.float32)
    values = np.arange(-middle, middle).astype(np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            weights = importance[256 * block : 256 * block + 256]
            effort = effort_for(weights, quick)
            effort = min(effort, DIFFERENT) if middle > np.float32(16) else effort
            settle(work, weights, middle, limit, ends, values, effort, lines, supers, chosen)
            for g in range(per_block):
                part = work[g * group : (g + 1) * group]
                for r in range(TILE):
                    lines[SCALE, r] = chosen[g, r] * supers[r]
                _round(part, lines[SCALE], middle, here, sums)
                for r in range(here):
                    scales[row + r, block * per_block + g] = np.int8(chosen[g, r])
            for r in range(here):
                super_scales[row + r, block] = supers[r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, group: int, importance: Array, quick: bool, middle: np.float32, ends: Array,
    codes: NDArray[np.uint8], scales: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q4_0, q5_0 or q2_0, whose scales are fp16.

    Returns as `round_super` does.
    """
    work, lines = np.zeros((group, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    kept, values = np.zeros((2, TILE), np.float32), np.arange(-middle, middle).astype(np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for g in range(scales.shape[1]):
            load(words, shift, row, group * g, group, bits)
            weights = importance[group * g : group * g + group]
            effort = effort_for(weights, quick)
            search(work, weights, middle, ends, values, effort, lines)
            store_half(work, weights, middle, effort, lines, kept)
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
