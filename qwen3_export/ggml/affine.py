"""Rounding onto scale · code + min.

q2_k, q4_k and q5_k have a super scale, q4_1 and q5_1 fp16 numbers.

    per group     try ranges a little wider or narrower than the weights'; for each, round to codes, then fit scale and
                  min by least squares on Σ w (scale · code + min − x)²; round and fit the best twice more
    super-block   fit super_scale and super_min to the groups' scales and mins, weighed by the cost of an error
    per group     try the integers next to scale / super_scale and min / super_min, keep the pair of least error

w is the importance of the input, 1 without one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.ggml.tiles import HUGE, ONE, ZERO, add_errors, half, store_codes, super_scale
from qwen3_export.model.compiled import Array, compiled, contracted
from qwen3_export.model.tiles import TILE, load

# The state of a tile's rows, one line per quantity: range, sums of the present attempt, the best fit so far.
_LOW, _RANGE, _INVERSE, _START, _WQ, _WQQ, _WXQ, _WX, _WXX, _SCALE, _MIN, _ERROR, _BEST = range(13)
_LINES = _BEST + 1


@compiled
def _bounds(work: Array, weights: Array, lines: Array, negative_only: bool) -> None:
    """Least weight, range, and the sums that do not depend on codes.

    With `negative_only` the least weight is at most zero, for types whose min cannot be positive.
    """
    low, size, total, squares = lines[_LOW], lines[_RANGE], lines[_WX], lines[_WXX]
    for r in range(TILE):
        low[r], size[r] = work[0, r], work[0, r]
        total[r], squares[r] = ZERO, ZERO
    for j in range(len(work)):
        for r in range(TILE):
            x = work[j, r]
            low[r] = x if x < low[r] else low[r]
            size[r] = x if x > size[r] else size[r]
            total[r] += weights[j] * x
            squares[r] += weights[j] * x * x
    for r in range(TILE):
        low[r] = min(low[r], ZERO) if negative_only else low[r]
        size[r] -= low[r]


@contracted
def _attempt(work: Array, weights: Array, top: np.float32, lines: Array) -> None:
    """Round for `_START` and `_INVERSE`, and sum up what the least-squares fit needs."""
    start, inverse, wq, wqq, wxq = lines[_START], lines[_INVERSE], lines[_WQ], lines[_WQQ], lines[_WXQ]
    for r in range(TILE):
        wq[r], wqq[r], wxq[r] = ZERO, ZERO, ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            first, second, third = ZERO, ZERO, ZERO
            for k in range(4):
                x = work[j + k, r]
                code = np.rint((x - start[r]) * inverse[r])
                code = code if code > ZERO else ZERO
                code = code if code < top else top
                weighed = weights[j + k] * code
                first += weighed
                second += weighed * code
                third += weighed * x
            wq[r] += first
            wqq[r] += second
            wxq[r] += third


@compiled
def _keep_fit(total: np.float32, negative_only: bool, lines: Array) -> None:
    """Fit scale and min to the attempt's codes, kept where their error is less."""
    for r in range(TILE):
        wq, wqq, wxq = lines[_WQ, r], lines[_WQQ, r], lines[_WXQ, r]
        wx, wxx = lines[_WX, r], lines[_WXX, r]
        determinant = total * wqq - wq * wq
        scale = (total * wxq - wx * wq) / determinant
        least = (wqq * wx - wq * wxq) / determinant
        if negative_only and not least < ZERO:
            least, scale = ZERO, wxq / wqq
        error = wxx - scale * wxq - least * wx
        if error < lines[_BEST, r] and scale > ZERO:
            lines[_BEST, r], lines[_SCALE, r], lines[_MIN, r] = error, scale, least


@compiled
def _search(work: Array, weights: Array, top: np.float32, stretches: Array, negative_only: bool, lines: Array) -> None:
    """Leave the best scale and min of a group in `lines`."""
    _bounds(work, weights, lines, negative_only)
    total = weights[: len(work)].sum()
    for r in range(TILE):
        lines[_BEST, r], lines[_MIN, r] = HUGE, lines[_LOW, r]
        lines[_SCALE, r] = lines[_RANGE, r] / top
        lines[_START, r] = lines[_LOW, r]
    for stretch in stretches:
        for r in range(TILE):
            size = lines[_RANGE, r]
            lines[_INVERSE, r] = (top + stretch) / size if size > ZERO else ZERO
        _attempt(work, weights, top, lines)
        _keep_fit(total, negative_only, lines)
    for _ in range(2):
        for r in range(TILE):
            scale = lines[_SCALE, r]
            lines[_INVERSE, r] = ONE / scale if scale > ZERO else ZERO
            lines[_START, r] = lines[_MIN, r]
        _attempt(work, weights, top, lines)
        _keep_fit(total, negative_only, lines)
    # What an error of the scale costs: Σ w code².
    for r in range(TILE):
        lines[_INVERSE, r] = ONE / lines[_SCALE, r] if lines[_SCALE, r] > ZERO else ZERO
        lines[_START, r] = lines[_MIN, r]
    _attempt(work, weights, top, lines)


@contracted
def _errors(work: Array, weights: Array, top: np.float32, lines: Array) -> None:
    """Σ w (scale · code + min − x)² with the nearest codes."""
    scale, least, inverse, error = lines[_SCALE], lines[_MIN], lines[_INVERSE], lines[_ERROR]
    for r in range(TILE):
        inverse[r] = ONE / scale[r] if scale[r] > ZERO else ZERO
        error[r] = ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            part = ZERO
            for k in range(4):
                x = work[j + k, r] - least[r]
                code = np.rint(x * inverse[r])
                code = code if code > ZERO else ZERO
                code = code if code < top else top
                miss = scale[r] * code - x
                part += weights[j + k] * (miss * miss)
            error[r] += part


@compiled
def _choose(
    work: Array, weights: Array, top: np.float32, supers: Array, limit: np.float32, near: Array, lines: Array,
    kept: Array,
) -> None:  # fmt: skip
    """Choose the integer scale and min of a group with the least error.

    `near` has the group's ideal scale and min, `supers` the super scale and super min. The integers are left in `kept`
    [0] and [1], their error in [2].
    """
    for r in range(TILE):
        kept[2, r] = HUGE
    for first in range(-1, 2):
        for second in range(-1, 2):
            for r in range(TILE):
                scale = np.rint(near[0, r] / supers[0, r]) + np.float32(first) if supers[0, r] > ZERO else ZERO
                least = np.rint(near[1, r] / supers[1, r]) + np.float32(second) if supers[1, r] > ZERO else ZERO
                lines[_WQ, r] = min(max(scale, ZERO), limit)
                lines[_WX, r] = min(max(least, ZERO), limit)
                lines[_SCALE, r] = lines[_WQ, r] * supers[0, r]
                lines[_MIN, r] = -lines[_WX, r] * supers[1, r]
            _errors(work, weights, top, lines)
            for r in range(TILE):
                if lines[_ERROR, r] < kept[2, r]:
                    kept[0, r], kept[1, r], kept[2, r] = lines[_WQ, r], lines[_WX, r], lines[_ERROR, r]


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
    words: Any, shift: int, group: int, importance: Array, top: np.float32, limit: np.float32, stretches: Array,
    codes: NDArray[np.uint8], scales: NDArray[np.int8], mins: NDArray[np.uint8], super_scales: Array,
    super_mins: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q2_k, q4_k or q5_k.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16. `importance` is `[in]`.
    The other arrays are filled; see `core.tensor` for their shapes. Returns Σ δ², Σ x², the largest |δ| and |x|.
    """
    per_block = 256 // group
    work, lines = np.zeros((256, TILE), np.float32), np.zeros((_LINES, TILE), np.float32)
    found, weighs = np.zeros((2, per_block, TILE), np.float32), np.zeros((2, per_block, TILE), np.float32)
    supers, near, kept = (
        np.zeros((2, TILE), np.float32),
        np.zeros((2, TILE), np.float32),
        np.zeros((3, TILE), np.float32),
    )
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for block in range(super_scales.shape[1]):
            load(words, shift, row, 256 * block, 256, bits)
            for g in range(per_block):
                weights = importance[256 * block + g * group : 256 * block + (g + 1) * group]
                _search(work[g * group : (g + 1) * group], weights, top, stretches, True, lines)
                for r in range(TILE):
                    found[0, g, r], found[1, g, r] = lines[_SCALE, r], -lines[_MIN, r]
                    weighs[0, g, r], weighs[1, g, r] = lines[_WQQ, r], weights.sum()
            for r in range(TILE):
                supers[0, r] = super_scale(found[0], weighs[0], r, ZERO, limit)
                supers[1, r] = super_scale(found[1], weighs[1], r, ZERO, limit)
            for g in range(per_block):
                part = work[g * group : (g + 1) * group]
                near[0], near[1] = found[0, g], found[1, g]
                weights = importance[256 * block + g * group : 256 * block + (g + 1) * group]
                _choose(part, weights, top, supers, limit, near, lines, kept)
                for r in range(TILE):
                    lines[_SCALE, r], lines[_MIN, r] = kept[0, r] * supers[0, r], -kept[1, r] * supers[1, r]
                _round(part, lines[_SCALE], lines[_MIN], top, here, sums)
                for r in range(here):
                    scales[row + r, block * per_block + g] = np.int8(kept[0, r])
                    mins[row + r, block * per_block + g] = np.uint8(np.int32(kept[1, r]))
            for r in range(here):
                super_scales[row + r, block], super_mins[row + r, block] = supers[0, r], supers[1, r]
            store_codes(codes, work, row, 256 * block, here)
    return sums


@compiled
def round_simple(
    words: Any, shift: int, importance: Array, top: np.float32, stretches: Array, codes: NDArray[np.uint8],
    scales: Array, mins: Array,
) -> NDArray[np.float64]:  # fmt: skip
    """Round rows of weights onto q4_1 or q5_1, whose scales and mins are fp16.

    Returns as `round_super` does.
    """
    work, lines = np.zeros((32, TILE), np.float32), np.zeros((_LINES, TILE), np.float32)
    sums, bits = np.zeros(4, np.float64), work.view(np.uint32)
    for row in range(0, len(words), TILE):
        here = min(TILE, len(words) - row)
        for group in range(scales.shape[1]):
            load(words, shift, row, 32 * group, 32, bits)
            _search(work, importance[32 * group : 32 * group + 32], top, stretches, False, lines)
            for r in range(TILE):
                lines[_SCALE, r], lines[_MIN, r] = half(lines[_SCALE, r]), half(lines[_MIN, r])
            _round(work, lines[_SCALE], lines[_MIN], top, here, sums)
            for r in range(here):
                scales[row + r, group], mins[row + r, group] = lines[_SCALE, r], lines[_MIN, r]
            store_codes(codes, work, row, 32 * group, here)
    return sums
