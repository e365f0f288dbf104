"""Choosing a super scale and the integer scales below it, without mins."""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.grids import Grid
from qwen3_export.ggml.scale_fit import SCALE, WVV, WXV, attempt, choose, invert, search
from qwen3_export.ggml.tiles import (
    ALIKE,
    BEYOND,
    FURTHER,
    NEXT,
    ONE,
    UNEVEN,
    ZERO,
    few_digits,
    half,
    next_half,
    stretched_super,
    super_scale,
)
from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE


@compiled
def settle(
    work: Array, weights: Array, grid: Grid, limit: np.float32, ends: Array, values: Array, effort: int, lines: Array,
    supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Choose the super scales `supers`, and the groups' integers `chosen`.

    The last line of `chosen` is the error.
    """
    groups = len(chosen) - 1
    found, weighs = np.zeros((groups, TILE), np.float32), np.zeros((groups, TILE), np.float32)
    _begin(work, weights, grid, limit, ends, values, effort, lines, found, weighs, supers, chosen)
    if effort == UNEVEN:
        # A few weights are fitted by scales of any size; without those extra ones, groups get scales of like size.
        other, trial = np.zeros_like(supers), np.zeros_like(chosen)
        near, counts = np.zeros_like(found), np.zeros_like(weighs)
        _begin(work, weights, grid, limit, ends, values, ALIKE, lines, near, counts, other, trial)
        _keep(supers, chosen, other, trial)
    if effort > ALIKE or (effort == ALIKE and few_digits(supers)):
        _improve(work, weights, grid, limit, found, weighs, effort, lines, supers, chosen)


@compiled
def _begin(
    work: Array, weights: Array, grid: Grid, limit: np.float32, ends: Array, values: Array, effort: int, lines: Array,
    found: Array, weighs: Array, supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Search every group's scale, then the super scales and integers nearest to them."""
    size = len(work) // len(found)
    for g in range(len(found)):
        part = slice(g * size, (g + 1) * size)
        search(work[part], weights[part], grid, ends, values, effort, lines)
        for r in range(TILE):
            found[g, r], weighs[g, r] = lines[SCALE, r], lines[WVV, r]
    for r in range(TILE):
        supers[r] = super_scale(found, weighs, r, -limit, limit - ONE)
    _choose_all(work, weights, grid, supers, limit, found, NEXT, lines, chosen)


@compiled
def _improve(
    work: Array, weights: Array, grid: Grid, limit: np.float32, found: Array, weighs: Array, effort: int, lines: Array,
    supers: Array, chosen: Array,
) -> None:  # fmt: skip
    """Try other super scales, fit them to codes, keep the best."""
    other, trial = np.zeros_like(supers), np.zeros_like(chosen)
    if effort == UNEVEN:
        for stretch in FURTHER:
            for r in range(TILE):
                other[r] = stretched_super(found, weighs, r, -limit, limit - ONE, stretch)
            _choose_all(work, weights, grid, other, limit, found, NEXT, lines, trial)
            _keep(supers, chosen, other, trial)
    if few_digits(supers):
        for step in range(-2, 3):
            for r in range(TILE):
                other[r] = next_half(supers[r], step)
            _choose_all(work, weights, grid, other, limit, found, BEYOND, lines, trial)
            _keep(supers, chosen, other, trial)
    for reach in range(2, 2 * effort + 1, 2):
        _choose_all(work, weights, grid, supers, limit, found, reach, lines, trial)
        _keep(supers, chosen, supers, trial)
        _refit(work, weights, grid, supers, chosen, lines, other)
        _choose_all(work, weights, grid, other, limit, found, reach, lines, trial)
        _keep(supers, chosen, other, trial)


@compiled
def _choose_all(
    work: Array, weights: Array, grid: Grid, supers: Array, limit: np.float32, found: Array, reach: int, lines: Array,
    chosen: Array,
) -> None:  # fmt: skip
    """Choose the integer scales of a super-block's groups, given its super scale."""
    groups, kept = len(found), np.zeros((2, TILE), np.float32)
    size = len(work) // groups
    chosen[groups] = ZERO
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        choose(work[part], weights[part], grid, supers, limit, found[g], reach, lines, kept)
        for r in range(TILE):
            chosen[g, r] = kept[0, r]
            chosen[groups, r] += kept[1, r]


@compiled
def _refit(work: Array, weights: Array, grid: Grid, supers: Array, chosen: Array, lines: Array, other: Array) -> None:
    """Fit the super scales to the integers and codes chosen below `supers`."""
    groups, sums = len(chosen) - 1, np.zeros((2, TILE), np.float32)
    size = len(work) // groups
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        for r in range(TILE):
            lines[SCALE, r] = chosen[g, r] * supers[r]
        invert(lines)
        attempt(work[part], weights[part], grid, lines)
        for r in range(TILE):
            sums[0, r] += chosen[g, r] * lines[WXV, r]
            sums[1, r] += chosen[g, r] * chosen[g, r] * lines[WVV, r]
    for r in range(TILE):
        other[r] = half(sums[0, r] / sums[1, r]) if sums[1, r] > ZERO else ZERO


@compiled
def _keep(supers: Array, chosen: Array, other: Array, trial: Array) -> None:
    """Keep the other super scale and its integers where their error is less."""
    last = len(chosen) - 1
    for r in range(TILE):
        if trial[last, r] < chosen[last, r]:
            supers[r] = other[r]
            for g in range(last + 1):
                chosen[g, r] = trial[g, r]
