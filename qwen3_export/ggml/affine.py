"""Rounding onto scale · code + min.

q2_k, q4_k and q5_k have a super scale, q4_1 and q5_1 fp16 numbers.

    per group     try ranges a little wider or narrower than the weights'; for each, round to codes, then fit scale and
                  min by least squares on Σ w (scale · code + min − x)²; round and fit the best twice more
    super-block   fit super_scale and super_min to the groups' scales and mins, weighed by the cost of an error
    per group     try the integers next to scale / super_scale and min / super_min, keep the pair of least error

w is the importance of the input, 1 without one. Where importance differs between inputs, more ranges are tried, and
super scales and mins are fitted once more to the codes; where a few inputs have most of it, other ones are tried, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ggml.affine_fit import LINES, MIN, SCALE, search, store_halves
from qwen3_export.ggml.affine_super import settle
from qwen3_export.ggml.tiles import NO, ONE, ZERO, add_errors, effort_for, store_codes
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE, load


@compiled
def _round(work: Array, scale: Array, least: Array, top: np.float32, here: int, sums: NDArray[np.float64]) -> None:
    """Round a group's weights to codes, and add what that costs to `sums`."""
    for r in range(TILE):
        inverse = ONE / scale[r] if scale[r] > ZERO else ZERO
        missed, whole, furthest, largest = ZERO, ZERO, ZERO, ZERO
        for j in range(len(work)):
            x = work[j, r]
            code = min(max(np.rint((x - least[r]) * inverse), ZERO), top)
            miss = abs(scale[r] * code + least[r] - x)
            missed += miss * miss
            whole += x * x
            furthest, largest = max(furthest, miss), max(largest, abs(x))
            work[j, r] = code
        if r < here:
            add_errors(sums, missed, whole, furthest, largest)


@compiled
def round_super(
    words: Any, shift: int, group: int, importance: Array, quick: bool, top: np.float32, limit: np.float32,
    stretches: Array, codes: NDArray[np.uint8], scales: NDArray[np.int8], mins: NDArray[np.uint8], super_scales: Array,
    super_mins: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q2_k, q4_k or q5_k.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    per_block = 256 // group
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    supers, chosen = np.zeros((2, TILE), np.float32), np.zeros((2, per_block + 1, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            weights = importance[256 * block : 256 * block + 256]
            settle(work, weights, top, limit, stretches, effort_for(weights, quick), lines, supers, chosen)
            for g in range(per_block):
                part = work[g * group : (g + 1) * group]
                for r in range(TILE):
                    lines[SCALE, r], lines[MIN, r] = chosen[0, g, r] * supers[0, r], -chosen[1, g, r] * supers[1, r]
                _round(part, lines[SCALE], lines[MIN], top, here, sums)
                for r in range(here):
                    scales[row + r, block * per_block + g] = np.int8(chosen[0, g, r])
                    mins[row + r, block * per_block + g] = np.uint8(np.int32(chosen[1, g, r]))
            for r in range(here):
                super_scales[row + r, block], super_mins[row + r, block] = supers[0, r], supers[1, r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, importance: Array, quick: bool, top: np.float32, stretches: Array,
    codes: NDArray[np.uint8], scales: Array, mins: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q4_1 or q5_1, whose scales and mins are fp16.

    Returns as `round_super` does.
    """
    work, lines = np.zeros((32, TILE), np.float32), np.zeros((LINES, TILE), np.float32)
    kept = np.zeros((3, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for group in range(scales.shape[1]):
            load(words, shift, row, 32 * group, 32, bits)
            weights = importance[32 * group : 32 * group + 32]
            effort = effort_for(weights, quick)
            search(work, weights, top, stretches, NO, effort, lines)
            store_halves(work, weights, top, effort, lines, kept)
            _round(work, lines[SCALE], lines[MIN], top, here, sums)
            for r in range(here):
                scales[row + r, group], mins[row + r, group] = lines[SCALE, r], lines[MIN, r]
            store_codes(codes, work, row, 32 * group, here)
    return sums
