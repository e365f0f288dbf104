"""Operations on tiles that all families of types share.

A tile (`model.tiles`) has 32 or 256 columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model.compiled import Array, compiled

ZERO, ONE = np.float32(0.0), np.float32(1.0)
# More than any error.
HUGE = np.float32(3e38)
# Multiplier that rounds fp32 to the eleven bits of fp16's mantissa; least normal number and subnormal step of fp16.
_SPLIT, _TINY, _STEP = np.float32(8193.0), np.float32(2.0**-14), np.float32(2.0**-24)
_LARGEST_HALF = np.float32(65504.0)
# Efforts of a search: a solver fits scales anew, inputs count alike, importances differ, a few of them are most of the
# sum. They and the next ones are NumPy's numbers, since numba compiles a function anew for each of Python's.
QUICK, ALIKE, DIFFERENT, UNEVEN = np.arange(-1, 3)
NONE, NEXT, BEYOND = np.arange(3)
YES, NO = np.bool_(True), np.bool_(False)
# How much of count · Σ w² the squared sum (Σ w)² of importances must be for these efforts to be spared.
_SAME, _EVEN = np.float32(0.999), np.float32(0.5)
# Where importance is uneven, super scales are tried whose largest integer moves by so much.
FURTHER = np.array([-9, -5, -3, -1.5, -0.5, 0.5, 1.5, 3, 12, 40], np.float32)
# Below, an fp16 number has at most six binary digits.
_FEW_DIGITS = np.float32(2.0**-18)
# The search for a super scale moves the largest integer scale by so much up or down.
_STRETCHES = np.arange(-6, 7, dtype=np.float32) * np.float32(0.15)


@compiled
def half(value: np.float32) -> np.float32:
    """The nearest fp16 number, in fp32."""
    size = abs(value)
    if size < _TINY:
        return np.rint(value / _STEP) * _STEP
    if size > _LARGEST_HALF:
        return _LARGEST_HALF if value > ZERO else -_LARGEST_HALF
    product = _SPLIT * value
    return product - (product - value)


@compiled
def store_codes(codes: NDArray[np.uint8], found: Array, row: int, column: int, here: int) -> None:
    """Write codes of a tile, still in fp32, to the rows they belong to."""
    for r in range(here):
        target = codes[row + r, column : column + len(found)]
        for j in range(len(found)):
            target[j] = np.uint8(np.int32(found[j, r]))


@compiled
def add_errors(
    sums: NDArray[np.float64], missed: np.float32, whole: np.float32, furthest: np.float32, largest: np.float32
) -> None:
    """Add what rounding a group has cost to `sums`.

    These are Σ δ², Σ x², and the largest |δ| and |x|.
    """
    sums[0] += missed
    sums[1] += whole
    sums[2], sums[3] = max(sums[2], furthest), max(sums[3], largest)


@compiled
def next_half(value: np.float32, steps: int) -> np.float32:
    """The fp16 number some steps away from zero, seen from another one."""
    size, unit = abs(value), _STEP
    while unit * np.float32(2048) <= size:
        unit *= np.float32(2)
    size = min(max(size + np.float32(steps) * unit, ZERO), _LARGEST_HALF)
    return size if value > ZERO else -size


@compiled
def few_digits(supers: Array) -> bool:
    """Whether a scale is so small that fp16 rounds it by much."""
    least = HUGE
    for value in supers.flat:
        least = min(least, abs(value))
    return bool(least < _FEW_DIGITS)


@compiled
def effort_for(weights: Array, quick: bool) -> Any:
    """How hard to search, given some inputs' importances."""
    if quick:
        return QUICK
    total, squares = ZERO, ZERO
    for weight in weights:
        total += weight
        squares += weight * weight
    part = total * total / (np.float32(len(weights)) * squares)
    if part < _EVEN:
        return UNEVEN
    return DIFFERENT if part < _SAME else ALIKE


@compiled
def super_scale(values: Array, weights: Array, r: int, low: np.float32, high: np.float32) -> np.float32:
    """The fp16 number d of least Σ weights · (values − d · integer)².

    `values` and `weights` are `[groups, rows]`, integers lie between `low` and `high`. The value of largest magnitude
    gets the integer of largest magnitude, or one close to it.
    """
    largest, best, found = _largest(values, r), ZERO, ZERO
    for stretch in _STRETCHES:
        products, squares = _fit_super(values, weights, r, low, high, largest, stretch)
        if squares > ZERO and products * products > best * squares:
            best, found = products * products / squares, products / squares
    return half(found)


@compiled
def stretched_super(
    values: Array, weights: Array, r: int, low: np.float32, high: np.float32, stretch: np.float32
) -> np.float32:
    """As `super_scale`, where the largest integer moves by `stretch` alone."""
    products, squares = _fit_super(values, weights, r, low, high, _largest(values, r), stretch)
    return half(products / squares) if squares > ZERO else ZERO


@compiled
def _largest(values: Array, r: int) -> np.float32:
    """The value of largest magnitude."""
    largest = ZERO
    for g in range(len(values)):
        largest = values[g, r] if abs(values[g, r]) > abs(largest) else largest
    return largest


@compiled
def _fit_super(
    values: Array, weights: Array, r: int, low: np.float32, high: np.float32, largest: np.float32, stretch: np.float32
) -> Any:
    """Σ weights · values · integer and Σ weights · integer² of one attempt."""
    products, squares = ZERO, ZERO
    end = low if -low > high else high
    inverse = (end + (stretch if end > ZERO else -stretch)) / largest if largest != ZERO else ZERO
    for g in range(len(values)):
        integer = min(max(np.rint(values[g, r] * inverse), low), high)
        products += weights[g, r] * values[g, r] * integer
        squares += weights[g, r] * integer * integer
    return products, squares
