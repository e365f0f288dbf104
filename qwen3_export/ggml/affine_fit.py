"""Choosing the scale and min of a group.

A group's state lies in `lines` `[LINES, rows]`, one line per quantity:

    LOW, RANGE       the least weight, and how far the largest lies above it
    START, INVERSE   the min of the present attempt, and one over its scale
    WQ, WQQ, WXQ     Σ w code, Σ w code² and Σ w x code of its codes; WX, WXX: Σ w x and Σ w x²
    SCALE, MIN, BEST the best scale and min so far, and their error
    ERROR            the error of integers below a super scale, or of a fit
    OLD_BEST, …      those of the best, while others are tried in their place
"""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.tiles import ALIKE, HUGE, NO, ONE, UNEVEN, YES, ZERO, half, next_half
from qwen3_export.model.compiled import Array, compiled, contracted
from qwen3_export.model.tiles import TILE

LOW, RANGE, INVERSE, START, WQ, WQQ, WXQ, WX, WXX, SCALE, MIN, ERROR, BEST, OLD_BEST, OLD_SCALE, OLD_MIN = range(16)
LINES = OLD_MIN + 1
# Where importance differs: stretches of the range that are tried, too, and parts of it that are cut off at either end.
_MORE = np.linspace(-2.1, 2.1, 15, dtype=np.float32)
_CUTS = np.array([-0.06, 0, 0.06, 0.14, 0.25, 0.4], np.float32)
_FINE_CUTS = np.array([-0.06, -0.03, 0, 0.025, 0.05, 0.08, 0.115, 0.16, 0.22, 0.3, 0.4], np.float32)
# The scatter of codes, as a part of Σ w · Σ w code², below which it is lost in rounding.
_SAME_CODES = np.float32(1e-5)
# After that, by how many codes scale and min are moved around the best ones.
_AROUND = np.array([1, 0.5, 0.25], np.float32)


@compiled
def _bounds(work: Array, weights: Array, lines: Array, negative_only: bool) -> None:
    """Least weight, range, and the sums that do not depend on codes.

    With `negative_only` the least weight is at most zero, for types whose min cannot be positive.
    """
    low, size, total, squares = lines[LOW], lines[RANGE], lines[WX], lines[WXX]
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
def attempt(work: Array, weights: Array, top: np.float32, lines: Array) -> None:
    """Round for `START` and `INVERSE`, and sum up what the least-squares fit needs."""
    start, inverse, wq, wqq, wxq = lines[START], lines[INVERSE], lines[WQ], lines[WQQ], lines[WXQ]
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
        wq, wqq, wxq = lines[WQ, r], lines[WQQ, r], lines[WXQ, r]
        wx, wxx = lines[WX, r], lines[WXX, r]
        determinant = total * wqq - wq * wq
        scale = (total * wxq - wx * wq) / determinant
        least = (wqq * wx - wq * wxq) / determinant
        told = determinant > _SAME_CODES * total * wqq
        if negative_only and not (told and least < ZERO):
            least, scale = ZERO, wxq / wqq
        error = wxx - scale * wxq - least * wx
        if error < lines[BEST, r] and scale > ZERO and (told or negative_only):
            lines[BEST, r], lines[SCALE, r], lines[MIN, r] = error, scale, least


@compiled
def _fit_min(total: np.float32, negative_only: bool, lines: Array) -> None:
    """Fit the min alone where the codes that count are almost the same.

    There the sums say nothing of the scale: one weight, or some of one code, have nearly all importance.
    """
    for r in range(TILE):
        wq, wqq = lines[WQ, r], lines[WQQ, r]
        if lines[INVERSE, r] > ZERO and not total * wqq - wq * wq > _SAME_CODES * total * wqq:
            lines[SCALE, r] = ONE / lines[INVERSE, r]
            lines[MIN, r] = (lines[WX, r] - lines[SCALE, r] * wq) / total
            if negative_only and not lines[MIN, r] < ZERO:
                lines[MIN, r] = ZERO
                lines[SCALE, r] = lines[WXQ, r] / wqq if lines[WXQ, r] > ZERO else lines[SCALE, r]


@contracted
def errors(work: Array, weights: Array, top: np.float32, lines: Array) -> None:
    """Σ w (scale · code + min − x)² with the nearest codes."""
    scale, least, inverse, error = lines[SCALE], lines[MIN], lines[INVERSE], lines[ERROR]
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
def _try(
    work: Array, weights: Array, top: np.float32, total: np.float32, negative_only: bool, exactly: bool, lines: Array
) -> None:
    """Round for `START` and `INVERSE`; keep a better fit to the codes.

    The fit's sums tell its error where that is no tiny part of Σ w x². With `exactly` the codes nearest to it tell.
    """
    attempt(work, weights, top, lines)
    if not exactly:
        _keep_fit(total, negative_only, lines)
        return
    for r in range(TILE):
        lines[OLD_BEST, r], lines[OLD_SCALE, r], lines[OLD_MIN, r] = lines[BEST, r], lines[SCALE, r], lines[MIN, r]
        lines[BEST, r] = HUGE
    _keep_fit(total, negative_only, lines)
    _fit_min(total, negative_only, lines)
    errors(work, weights, top, lines)
    for r in range(TILE):
        better = lines[ERROR, r] < lines[OLD_BEST, r]
        lines[BEST, r] = lines[ERROR, r] if better else lines[OLD_BEST, r]
        lines[SCALE, r] = lines[SCALE, r] if better else lines[OLD_SCALE, r]
        lines[MIN, r] = lines[MIN, r] if better else lines[OLD_MIN, r]


@compiled
def begin_best(lines: Array) -> None:
    """Try `SCALE` and `MIN` next: other codes may be nearest to them."""
    for r in range(TILE):
        lines[INVERSE, r] = ONE / lines[SCALE, r] if lines[SCALE, r] > ZERO else ZERO
        lines[START, r] = lines[MIN, r]


@compiled
def search(
    work: Array, weights: Array, top: np.float32, stretches: Array, negative_only: bool, effort: int, lines: Array
) -> None:
    """Leave a group's best scale and min in `lines`, and their codes' sums."""
    _bounds(work, weights, lines, negative_only)
    total = weights[: len(work)].sum()
    for r in range(TILE):
        lines[BEST, r], lines[MIN, r] = HUGE, lines[LOW, r]
        lines[SCALE, r] = lines[RANGE, r] / top
        lines[START, r] = lines[LOW, r]
    further = effort == UNEVEN or (effort > ALIKE and not negative_only)
    for more in range(2 if further else 1):
        for stretch in _MORE if more else stretches:
            for r in range(TILE):
                size = lines[RANGE, r]
                lines[INVERSE, r] = (top + stretch) / size if size > ZERO else ZERO
            _try(work, weights, top, total, negative_only, further, lines)
    if further:
        _search_further(work, weights, top, total, negative_only, lines)
    for _ in range(2 + 2 * max(effort, 0)):
        begin_best(lines)
        _try(work, weights, top, total, negative_only, further, lines)
    if further and not negative_only:
        _search_around(work, weights, top, total, lines)
    begin_best(lines)
    attempt(work, weights, top, lines)


@compiled
def _search_around(work: Array, weights: Array, top: np.float32, total: np.float32, lines: Array) -> None:
    """Try scales and mins beside the best ones."""
    for wide in _AROUND:
        for below in range(-1, 2):
            for above in range(-1, 2):
                begin_best(lines)
                for r in range(TILE):
                    scale = lines[SCALE, r]
                    lines[START, r] += np.float32(below) * wide * scale
                    lines[INVERSE, r] *= ONE + np.float32(above) * wide / top
                _try(work, weights, top, total, NO, YES, lines)


@compiled
def _search_further(
    work: Array, weights: Array, top: np.float32, total: np.float32, negative_only: bool, lines: Array
) -> None:
    """Try ranges that leave out weights at either end."""
    cuts = _CUTS if negative_only else _FINE_CUTS
    for below in cuts:
        for above in cuts:
            for r in range(TILE):
                size = lines[RANGE, r]
                lines[START, r] = lines[LOW, r] + below * size
                lines[INVERSE, r] = top / (size * (ONE - below - above)) if size > ZERO else ZERO
            _try(work, weights, top, total, negative_only, YES, lines)


@compiled
def store_halves(work: Array, weights: Array, top: np.float32, effort: int, lines: Array, kept: Array) -> None:
    """Round `SCALE` and `MIN` to fp16: to the nearest numbers, or better neighbours."""
    for r in range(TILE):
        lines[SCALE, r], lines[MIN, r] = half(lines[SCALE, r]), half(lines[MIN, r])
    if effort <= ALIKE:
        return
    for r in range(TILE):
        kept[0, r], kept[1, r], kept[2, r] = lines[SCALE, r], lines[MIN, r], HUGE
    for of in (0, 1, 0, 1):
        for step in (0, -1, 1):
            for r in range(TILE):
                lines[SCALE, r] = next_half(kept[0, r], step) if of == 0 else kept[0, r]
                lines[MIN, r] = next_half(kept[1, r], step) if of == 1 else kept[1, r]
            errors(work, weights, top, lines)
            for r in range(TILE):
                if lines[ERROR, r] < kept[2, r]:
                    kept[0, r], kept[1, r], kept[2, r] = lines[SCALE, r], lines[MIN, r], lines[ERROR, r]
    for r in range(TILE):
        lines[SCALE, r], lines[MIN, r] = kept[0, r], kept[1, r]
