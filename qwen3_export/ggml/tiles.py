"""Operations on tiles that all families of types share.

A tile (`model.tiles`) has 32 or 256 columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model.compiled import Array, compiled

ZERO, ONE = np.float32(0.0), np.float32(1.0)
# More than any error.
HUGE = np.float32(3e38)
# Multiplier that rounds fp32 to the eleven bits of fp16's mantissa; least normal number and subnormal step of fp16.
_SPLIT, _TINY, _STEP = np.float32(8193.0), np.float32(2.0**-14), np.float32(2.0**-24)
_LARGEST_HALF = np.float32(65504.0)
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
def super_scale(values: Array, weights: Array, r: int, low: np.float32, high: np.float32) -> np.float32:
    """The fp16 number d of least Σ weights · (values − d · integer)².

    `values` and `weights` are `[groups, rows]`, integers lie between `low` and `high`. The value of largest magnitude
    gets the integer of largest magnitude, or one close to it.
    """
    largest = ZERO
    for g in range(len(values)):
        if abs(values[g, r]) > abs(largest):
            largest = values[g, r]
    if largest == ZERO:
        return ZERO
    end = low if -low > high else high
    best, found = ZERO, largest / end
    for stretch in _STRETCHES:
        inverse = (end + (stretch if end > ZERO else -stretch)) / largest
        products, squares = ZERO, ZERO
        for g in range(len(values)):
            integer = min(max(np.rint(values[g, r] * inverse), low), high)
            products += weights[g, r] * values[g, r] * integer
            squares += weights[g, r] * integer * integer
        if squares > ZERO and products * products > best * squares:
            best, found = products * products / squares, products / squares
    return half(found)
