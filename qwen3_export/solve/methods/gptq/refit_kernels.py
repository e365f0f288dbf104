"""The compiled loop that refits one super block of a K-quant; see `gptq.block_refit`.

A block has `[rows, 256]` weights, `code · d · scale − m · min`. Its state is changed in place: `scales` and `mins`
`[rows, groups]` are small integers, `above` `[rows, 2]` holds d and m. Types without mins have m = 0 and mins that
cannot be above 0.
"""

from __future__ import annotations

import numpy as np

from qwen3_export.ggml.tiles import half
from qwen3_export.model.compiled import Array, compiled

# Integers beside the best number for both that are tried for a scale.
_BESIDE = np.array([0, 1, -1, 2], np.float64)
# Two directions whose determinant is a smaller share of what it could be are taken for one.
_ALIKE = 1e-6


@compiled
def _joint(a: float, b: float, c: float, first: float, second: float) -> float:
    """The first of two steps to the minimum of a quadratic form.

    Where the two cannot be told apart, the step for the first number alone.
    """
    determinant = a * c - b * b
    if determinant > _ALIKE * a * c:
        return (b * second - c * first) / determinant
    return -first / a if a > 0 else 0.0


@compiled
def _cost(a: float, b: float, c: float, first: float, second: float, one: float, two: float) -> float:
    """By how much two steps change the error."""
    return a * one * one + 2 * b * one * two + c * two * two + 2 * (first * one + second * two)


@compiled
def _refit_group(
    hessian: Array, codes: Array, slopes: Array, begin: int, group: int, state: Array, above: Array, limits: Array
) -> None:
    """Move a group's scale and min `state` to better integers; `slopes` follow."""
    a, b, c, first, second = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(begin, begin + group):
        total, ones = 0.0, 0.0
        for k in range(begin, begin + group):
            total += hessian[i, k] * codes[k]
            ones += hessian[i, k]
        a += codes[i] * total
        b += total
        c += ones
        first += codes[i] * slopes[i]
        second += slopes[i]
    d, m = float(above[0]), float(above[1])
    a, b, c, first, second = a * d * d, -b * d * m, c * m * m, first * d, -second * m
    middle = np.floor(_joint(a, b, c, first, second))
    least, one, two = 0.0, 0.0, 0.0
    for beside in range(len(_BESIDE) + 1):
        # The last try leaves the scale and moves the min alone.
        step = middle + _BESIDE[beside] if beside < len(_BESIDE) else 0.0
        step = min(max(state[0] + step, limits[0]), limits[1]) - state[0]
        other = np.rint(-(second + b * step) / c) if c > 0 else 0.0
        other = min(max(state[1] + other, 0.0), limits[2]) - state[1]
        cost = _cost(a, b, c, first, second, step, other)
        if cost < least:
            least, one, two = cost, step, other
    state[0] += one
    state[1] += two
    if one != 0 or two != 0:
        for i in range(begin, begin + group):
            moved = np.float32(d * codes[i] * one - m * two)
            for k in range(len(slopes)):
                slopes[k] += hessian[i, k] * moved


@compiled
def _refit_above(hessian: Array, parts: Array, slopes: Array, through: Array, above: Array, has_mins: bool) -> None:
    """Move d and m to the best fp16 numbers.

    `parts` `[2, n]` are the weights' shares of d and of m.
    """
    through[:] = np.float32(0)
    for i in range(len(slopes)):
        for k in range(len(slopes)):
            through[0, k] += hessian[i, k] * parts[0, i]
        if has_mins:
            for k in range(len(slopes)):
                through[1, k] += hessian[i, k] * parts[1, i]
    a, b, c, first, second = 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(len(slopes)):
        a += parts[0, k] * through[0, k]
        b += parts[1, k] * through[0, k]
        c += parts[1, k] * through[1, k]
        first += parts[0, k] * slopes[k]
        second += parts[1, k] * slopes[k]
    d = half(np.float32(above[0] + _joint(a, b, c, first, second)))
    one = float(d) - above[0]
    m = half(np.float32(above[1] - (second + b * one) / c)) if c > 0 else above[1]
    cost = _cost(a, b, c, first, second, one, float(m) - above[1])
    if cost < 0 and (not has_mins or (d >= 0 and m >= 0)):
        above[0], above[1] = d, m


@compiled
def refit_block(
    hessian: Array, codes: Array, slopes: Array, scales: Array, mins: Array, above: Array, limits: Array,
    has_mins: bool, steps: Array,
) -> None:  # fmt: skip
    """Refit the scales, mins and super numbers of a block's rows.

    `slopes` are the error's gradient by weight, which is changed. `limits`: least and largest scale, largest min.
    Fills `steps`, by how much each weight changes.
    """
    rows, size = codes.shape
    groups = scales.shape[1]
    group = size // groups
    state, parts, through = np.empty(2, np.float32), np.zeros((2, size), np.float32), np.empty((2, size), np.float32)
    for r in range(rows):
        for i in range(size):
            steps[r, i] = -(codes[r, i] * scales[r, i // group] * above[r, 0] - mins[r, i // group] * above[r, 1])
        for j in range(groups):
            state[0], state[1] = scales[r, j], mins[r, j]
            _refit_group(hessian, codes[r], slopes[r], j * group, group, state, above[r], limits)
            scales[r, j], mins[r, j] = state[0], state[1]
        for i in range(size):
            parts[0, i], parts[1, i] = codes[r, i] * scales[r, i // group], -mins[r, i // group]
        _refit_above(hessian, parts, slopes[r], through, above[r], has_mins)
        for i in range(size):
            steps[r, i] += parts[0, i] * above[r, 0] + parts[1, i] * above[r, 1]
