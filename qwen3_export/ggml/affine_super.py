"""Choosing super scales and super mins, and the integers below them."""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.affine_fit import (
    ERROR,
    MIN,
    SCALE,
    WQ,
    WQQ,
    WX,
    WXQ,
    attempt,
    begin_best,
    errors,
    search,
)
from qwen3_export.ggml.tiles import (
    ALIKE,
    BEYOND,
    FURTHER,
    HUGE,
    NEXT,
    NONE,
    UNEVEN,
    YES,
    ZERO,
    few_digits,
    half,
    next_half,
    stretched_super,
    super_scale,
)
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE

# What the search leaves of each group: ideal scale and min (with its sign changed), Σ w code² and Σ w as their weights,
# the mean code, Σ w x.
_SCALES, _MINS, _WQQ, _W, _MEAN, _WX = range(6)


@compiled
def settle(
    work: Array, weights: Array, top: np.float32, limit: np.float32, stretches: Array, effort: int, lines: Array,
    supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Choose super scales and mins `supers`, and the groups' integers `chosen`.

    `chosen` is `[2, groups + 1, rows]`: scales and mins; the last line of the first is the error.
    """
    found = np.zeros((6, chosen.shape[1] - 1, TILE), np.float32)
    _begin(work, weights, top, limit, stretches, effort, lines, found, supers, chosen)
    if effort == UNEVEN:
        # A few weights are fitted by scales of any size; without that effort, groups get scales of like size.
        other, trial, near = np.zeros_like(supers), np.zeros_like(chosen), np.zeros_like(found)
        _begin(work, weights, top, limit, stretches, ALIKE, lines, near, other, trial)
        _keep(supers, chosen, other, trial)
    if effort > ALIKE or (effort == ALIKE and few_digits(supers[0])):
        _improve(work, weights, top, limit, found, effort, lines, supers, chosen)


@compiled
def _begin(
    work: Array, weights: Array, top: np.float32, limit: np.float32, stretches: Array, effort: int, lines: Array,
    found: Array, supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Search every group's scale and min, then the nearest super ones and integers."""
    size = len(work) // found.shape[1]
    for g in range(found.shape[1]):
        weighed = weights[g * size : (g + 1) * size]
        search(work[g * size : (g + 1) * size], weighed, top, stretches, YES, effort, lines)
        total = weighed.sum()
        for r in range(TILE):
            found[_SCALES, g, r], found[_MINS, g, r] = lines[SCALE, r], -lines[MIN, r]
            found[_WQQ, g, r], found[_W, g, r] = lines[WQQ, r], total
            found[_MEAN, g, r], found[_WX, g, r] = lines[WQ, r] / total, lines[WX, r]
    for r in range(TILE):
        supers[0, r] = super_scale(found[_SCALES], found[_WQQ], r, ZERO, limit)
        supers[1, r] = super_scale(found[_MINS], found[_W], r, ZERO, limit)
    _choose_all(work, weights, top, supers, limit, found, NONE, NEXT, lines, chosen)


@compiled
def _improve(
    work: Array, weights: Array, top: np.float32, limit: np.float32, found: Array, effort: int, lines: Array,
    supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Try other super scales and mins, fit them to codes, keep the best."""
    other, trial = np.zeros_like(supers), np.zeros_like(chosen)
    if effort == UNEVEN:
        for of in (0, 1):
            for stretch in FURTHER:
                for r in range(TILE):
                    other[1 - of, r] = supers[1 - of, r]
                    other[of, r] = stretched_super(found[of], found[2 + of], r, ZERO, limit, stretch)
                _choose_all(work, weights, top, other, limit, found, NEXT, NONE, lines, trial)
                _keep(supers, chosen, other, trial)
    if few_digits(supers[0]):
        for step in (-2, -1, 1, 2, 3):
            for r in range(TILE):
                other[0, r], other[1, r] = next_half(supers[0, r], step), supers[1, r]
            _choose_all(work, weights, top, other, limit, found, BEYOND, NEXT, lines, trial)
            _keep(supers, chosen, other, trial)
    for reach in range(1, 2 * effort + 1):
        _refit(work, weights, top, supers, found, chosen, lines, other)
        _choose_all(work, weights, top, other, limit, found, reach, NEXT, lines, trial)
        _keep(supers, chosen, other, trial)


@compiled
def _choose(
    work: Array, weights: Array, top: np.float32, supers: Array, limit: np.float32, near: Array, reach: int,
    beside: int, lines: Array, kept: Array,
) -> None:  # fmt: skip
    """Choose the integer scale and min of a group with the least error.

    `near` is what the search left of the group. The integers are left in `kept` [0] and [1], their error in [2]. With
    `reach` 0 all neighbours are tried. Otherwise scales lie no further than `reach` from the ideal one; each is tried
    with the min that is best beside it, and those no further than `beside` from that.
    """
    kept[2] = HUGE
    span = max(reach, 1)
    for first in range(-span, span + 1):
        for second in range(-beside, beside + 1):
            for r in range(TILE):
                scale = np.rint(near[_SCALES, r] / supers[0, r]) + np.float32(first) if supers[0, r] > ZERO else ZERO
                lines[WQ, r] = min(max(scale, ZERO), limit)
                lines[SCALE, r] = lines[WQ, r] * supers[0, r]
                least = near[_MINS, r]
                if reach > 0:
                    least += (lines[SCALE, r] - near[_SCALES, r]) * near[_MEAN, r]
                least = np.rint(least / supers[1, r]) + np.float32(second) if supers[1, r] > ZERO else ZERO
                lines[WX, r] = min(max(least, ZERO), limit)
                lines[MIN, r] = -lines[WX, r] * supers[1, r]
            errors(work, weights, top, lines)
            for r in range(TILE):
                if lines[ERROR, r] < kept[2, r]:
                    kept[0, r], kept[1, r], kept[2, r] = lines[WQ, r], lines[WX, r], lines[ERROR, r]


@compiled
def _choose_all(
    work: Array, weights: Array, top: np.float32, supers: Array, limit: np.float32, found: Array, reach: int,
    beside: int, lines: Array, chosen: Array,
) -> None:  # fmt: skip
    """Choose the integers of a super-block's groups, given its super scale and super min."""
    groups, kept = found.shape[1], np.zeros((3, TILE), np.float32)
    size = len(work) // groups
    chosen[0, groups] = ZERO
    for g in range(groups):
        part, weighed = work[g * size : (g + 1) * size], weights[g * size : (g + 1) * size]
        _choose(part, weighed, top, supers, limit, found[:, g], reach, beside, lines, kept)
        for r in range(TILE):
            chosen[0, g, r], chosen[1, g, r] = kept[0, r], kept[1, r]
            chosen[0, groups, r] += kept[2, r]


@compiled
def _refit(
    work: Array, weights: Array, top: np.float32, supers: Array, found: Array, chosen: Array, lines: Array, other: Array
) -> None:
    """Fit super scale and super min to the integers and codes below `supers`."""
    groups, sums = found.shape[1], np.zeros((5, TILE), np.float32)
    size = len(work) // groups
    for g in range(groups):
        for r in range(TILE):
            lines[SCALE, r] = chosen[0, g, r] * supers[0, r]
            lines[MIN, r] = -chosen[1, g, r] * supers[1, r]
        begin_best(lines)
        attempt(work[g * size : (g + 1) * size], weights[g * size : (g + 1) * size], top, lines)
        for r in range(TILE):
            scale, least = chosen[0, g, r], -chosen[1, g, r]
            sums[0, r] += scale * scale * lines[WQQ, r]
            sums[1, r] += scale * least * lines[WQ, r]
            sums[2, r] += least * least * found[_W, g, r]
            sums[3, r] += scale * lines[WXQ, r]
            sums[4, r] += least * found[_WX, g, r]
    for r in range(TILE):
        a, b, c, first, second = sums[0, r], sums[1, r], sums[2, r], sums[3, r], sums[4, r]
        determinant = a * c - b * b
        other[0, r], other[1, r] = supers[0, r], supers[1, r]
        if determinant > np.float32(1e-5) * a * c:
            scale, least = half((c * first - b * second) / determinant), half((a * second - b * first) / determinant)
            if scale > ZERO and least >= ZERO:
                other[0, r], other[1, r] = scale, least
        elif a > ZERO:
            other[0, r] = half(max(first - b * supers[1, r], ZERO) / a)


@compiled
def _keep(supers: Array, chosen: Array, other: Array, trial: Array) -> None:
    """Keep other super scales and their integers where their error is less."""
    last = chosen.shape[1] - 1
    for r in range(TILE):
        if trial[0, last, r] < chosen[0, last, r]:
            for of in range(2):
                supers[of, r] = other[of, r]
                for g in range(last + 1):
                    chosen[of, g, r] = trial[of, g, r]
