"""Choosing the scale of a group without a min.

`symmetric` and `codebook` share it: their values v differ, the search for the scale does not. A group's state lies in
`lines` `[LINES, rows]`, one line per quantity:

    PEAK          the weight furthest from zero
    DEAREST       the weight with the largest w x², whose loss would cost most
    INVERSE       one over the scale of the present attempt; WXV, WVV: Σ w x v and Σ w v² of its values v
    SCALE, BEST   the best scale so far, and (Σ w x v)² / Σ w v², the part of Σ w x² that it explains
    ERROR, CODE   the error of an integer scale below a super scale, and that integer
"""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.grids import Grid, nearest
from qwen3_export.ggml.tiles import ALIKE, HUGE, ONE, UNEVEN, ZERO, half, next_half
from qwen3_export.model.compiled import Array, compiled, contracted
from qwen3_export.model.tiles import TILE

PEAK, DEAREST, INVERSE, WXV, WVV, SCALE, BEST, ERROR, CODE = np.arange(9)
LINES = CODE + 1
# Where importance differs, the largest weight gets values beside the outermost one, too: so many eighths of it away on
# grids of up to sixteen values. Finer grids lose more by a clipped weight, so there the steps shrink.
_SPREAD = np.linspace(-2.24, 1.6, 21, dtype=np.float32)


@contracted
def attempt(work: Array, weights: Array, grid: Grid, lines: Array) -> None:
    """Take the nearest values for `INVERSE`, and sum up what the least-squares fit needs."""
    inverse, wxv, wvv = lines[INVERSE], lines[WXV], lines[WVV]
    for r in range(TILE):
        wxv[r], wvv[r] = ZERO, ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            first, second = ZERO, ZERO
            for k in range(4):
                x = work[j + k, r]
                value = nearest(x * inverse[r], grid)
                weighed = weights[j + k] * value
                first += weighed * x
                second += weighed * value
            wxv[r] += first
            wvv[r] += second


@compiled
def keep_fit(lines: Array) -> None:
    """Keep the least-squares scale of the attempt where it explains more."""
    for r in range(TILE):
        wxv, wvv = lines[WXV, r], lines[WVV, r]
        if wvv > ZERO and wxv * wxv > lines[BEST, r] * wvv:
            lines[BEST, r], lines[SCALE, r] = wxv * wxv / wvv, wxv / wvv


@compiled
def invert(lines: Array) -> None:
    """Try `SCALE` next: other values may be nearest to it."""
    for r in range(TILE):
        lines[INVERSE, r] = ONE / lines[SCALE, r] if lines[SCALE, r] != ZERO else ZERO


@compiled
def _try(of: int, value: np.float32, work: Array, weights: Array, grid: Grid, lines: Array) -> None:
    """Try the scale that brings a weight, `PEAK` or `DEAREST`, to a value."""
    for r in range(TILE):
        lines[INVERSE, r] = value / lines[of, r] if lines[of, r] != ZERO else ZERO
    attempt(work, weights, grid, lines)
    keep_fit(lines)


@compiled
def _begin(work: Array, lines: Array) -> None:
    """Begin a group: find its peak, forget the scale."""
    for r in range(TILE):
        lines[PEAK, r], lines[BEST, r], lines[SCALE, r] = ZERO, ZERO, ZERO
    for j in range(len(work)):
        for r in range(TILE):
            x = work[j, r]
            lines[PEAK, r] = x if abs(x) > abs(lines[PEAK, r]) else lines[PEAK, r]


@compiled
def _find_dearest(work: Array, weights: Array, lines: Array) -> None:
    """Find the weight that would cost most."""
    for r in range(TILE):
        most, lines[DEAREST, r] = ZERO, ZERO
        for j in range(len(work)):
            cost = weights[j] * work[j, r] * work[j, r]
            if cost > most:
                most, lines[DEAREST, r] = cost, work[j, r]


@compiled
def search(work: Array, weights: Array, grid: Grid, ends: Array, values: Array, effort: int, lines: Array) -> None:
    """Leave the best scale of a group in `lines`, and Σ w v².

    `ends` are the values to try for the largest weight. Where importance differs, more are tried; where it is uneven,
    the dearest weight gets each of the grid's `values`, too.
    """
    _begin(work, lines)
    for end in ends:
        _try(PEAK, end, work, weights, grid, lines)
    if effort > ALIKE:
        fine = ONE / np.float32(max(len(values) // 2, 8))
        for spread in _SPREAD:
            _try(PEAK, (ONE + spread * fine) * values[0], work, weights, grid, lines)
        for spread in _SPREAD[::3]:
            _try(PEAK, (ONE + spread * fine) * values[-1], work, weights, grid, lines)
    if effort == UNEVEN:
        _find_dearest(work, weights, lines)
        for value in values:
            _try(DEAREST, value, work, weights, grid, lines)
    for _ in range(2):
        invert(lines)
        attempt(work, weights, grid, lines)
        keep_fit(lines)


@contracted
def errors(work: Array, weights: Array, grid: Grid, lines: Array) -> None:
    """Σ w (scale · v − x)² of `SCALE` with the nearest values."""
    scale, inverse, error = lines[SCALE], lines[INVERSE], lines[ERROR]
    for r in range(TILE):
        inverse[r] = ONE / scale[r] if scale[r] != ZERO else ZERO
        error[r] = ZERO
    for j in range(0, len(work), 4):
        for r in range(TILE):
            part = ZERO
            for k in range(4):
                x = work[j + k, r]
                miss = scale[r] * nearest(x * inverse[r], grid) - x
                part += weights[j + k] * (miss * miss)
            error[r] += part


@compiled
def begin_choice(kept: Array) -> None:
    """Begin to choose an integer scale.

    `kept` [0] will be the best one, [1] its error.
    """
    for r in range(TILE):
        kept[1, r] = HUGE


@compiled
def keep_least(of: int, lines: Array, kept: Array) -> None:
    """Keep what was tried, the line `of`, where its error is less."""
    for r in range(TILE):
        if lines[ERROR, r] < kept[1, r]:
            kept[0, r], kept[1, r] = lines[of, r], lines[ERROR, r]


@compiled
def store_half(work: Array, weights: Array, grid: Grid, effort: int, lines: Array, kept: Array) -> None:
    """Round `SCALE` to fp16: to the nearest number, or a better one beside it."""
    for r in range(TILE):
        lines[SCALE, r] = half(lines[SCALE, r])
    if effort <= ALIKE:
        return
    begin_choice(kept)
    for _ in range(2):
        errors(work, weights, grid, lines)
        keep_least(SCALE, lines, kept)
        for step in (-1, 2):
            for r in range(TILE):
                lines[SCALE, r] = next_half(lines[SCALE, r], step)
            errors(work, weights, grid, lines)
            keep_least(SCALE, lines, kept)
        for r in range(TILE):
            lines[SCALE, r] = kept[0, r]


@compiled
def choose(
    work: Array, weights: Array, grid: Grid, supers: Array, limit: np.float32, near: Array, reach: int, lines: Array,
    kept: Array,
) -> None:  # fmt: skip
    """Choose the integer scale of a group with the least error.

    It is left in `kept` [0], its error in [1]; `near` is the ideal scale, and no integer further than `reach` is tried.
    """
    begin_choice(kept)
    for step in range(-reach, reach + 1):
        for r in range(TILE):
            code = np.rint(near[r] / supers[r]) + np.float32(step) if supers[r] != ZERO else ZERO
            lines[CODE, r] = min(max(code, -limit), limit - ONE)
            lines[SCALE, r] = lines[CODE, r] * supers[r]
        errors(work, weights, grid, lines)
        keep_least(CODE, lines, kept)
