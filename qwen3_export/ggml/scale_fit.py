"""Choosing the scale of a group without a min.

`symmetric` and `codebook` share it: their values v differ, the search for the scale does not. A group's state lies in
`lines` `[LINES, rows]`, one line per quantity:

    PEAK          the weight furthest from zero
    INVERSE       one over the scale of the present attempt; WXV, WVV: Σ w x v and Σ w v² of its values v
    SCALE, BEST   the best scale so far, and (Σ w x v)² / Σ w v², the part of Σ w x² that it explains
    ERROR, CODE   the error of an integer scale below a super scale, and that integer
"""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.tiles import HUGE, ONE, ZERO
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE

PEAK, INVERSE, WXV, WVV, SCALE, BEST, ERROR, CODE = range(8)
LINES = CODE + 1


@compiled
def find_peak(work: Array, lines: Array) -> None:
    """Begin a group: find its peak, forget the scale."""
    for r in range(TILE):
        lines[PEAK, r], lines[BEST, r], lines[SCALE, r] = ZERO, ZERO, ZERO
    for j in range(len(work)):
        for r in range(TILE):
            x = work[j, r]
            lines[PEAK, r] = x if abs(x) > abs(lines[PEAK, r]) else lines[PEAK, r]


@compiled
def try_end(end: np.float32, lines: Array) -> None:
    """Try the scale that brings the peak to `end` next."""
    for r in range(TILE):
        lines[INVERSE, r] = end / lines[PEAK, r] if lines[PEAK, r] != ZERO else ZERO


@compiled
def try_best(lines: Array) -> None:
    """Try the best scale so far next: other values may be nearest now."""
    for r in range(TILE):
        lines[INVERSE, r] = ONE / lines[SCALE, r] if lines[SCALE, r] != ZERO else ZERO


@compiled
def keep_fit(lines: Array) -> None:
    """Keep the least-squares scale of the attempt where it explains more."""
    for r in range(TILE):
        wxv, wvv = lines[WXV, r], lines[WVV, r]
        if wvv > ZERO and wxv * wxv > lines[BEST, r] * wvv:
            lines[BEST, r], lines[SCALE, r] = wxv * wxv / wvv, wxv / wvv


@compiled
def begin_choice(kept: Array) -> None:
    """Begin to choose an integer scale.

    `kept` [0] will be the best one, [1] its error.
    """
    for r in range(TILE):
        kept[1, r] = HUGE


@compiled
def try_integer(near: Array, step: int, supers: Array, limit: np.float32, lines: Array) -> None:
    """Try the integer that lies `step` away from the ideal one next.

    The ideal one is `near`, in units of the super scale `supers`.
    """
    for r in range(TILE):
        code = np.rint(near[r] / supers[r]) + np.float32(step) if supers[r] != ZERO else ZERO
        lines[CODE, r] = min(max(code, -limit), limit - ONE)
        lines[SCALE, r] = lines[CODE, r] * supers[r]


@compiled
def keep_least(lines: Array, kept: Array) -> None:
    """Keep the integer that was tried where its error is less."""
    for r in range(TILE):
        if lines[ERROR, r] < kept[1, r]:
            kept[0, r], kept[1, r] = lines[CODE, r], lines[ERROR, r]
