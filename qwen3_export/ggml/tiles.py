"""A tile: 256 or 32 columns of some rows, `[columns, rows]`.

So every step works on all rows at once.

What the rounding kernels of all families share: reading a tile, fp16 as an operation on fp32, and the number that
the integer scales of a super-block are multiples of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model.compiled import Array, compiled

# Rows of a tile: the columns of a group stay in the nearest cache.
TILE = 32
ZERO, ONE = np.float32(0.0), np.float32(1.0)
# More than any error.
HUGE = np.float32(3e38)
# Rounds a product of fp32 to the eleven bits of fp16's mantissa, and fp16's subnormal step.
_SPLIT, _TINY, _STEP = np.float32(8193.0), np.float32(2.0**-14), np.float32(2.0**-24)
_LARGEST_HALF = np.float32(65504.0)
# By how much of an integer the largest scale may be stretched or squeezed in the search for a super scale.
_STRETCHES = np.arange(-6, 7, dtype=np.float32) * np.float32(0.15)


@compiled
def load(words: Any, shift: int, row: int, column: int, length: int, bits: NDArray[np.uint32]) -> None:
    """Some rows' weights of `length` columns into a tile.

    Rows that are not there repeat the last one.
    """
    for r in range(TILE):
        source = words[min(row + r, len(words) - 1), column : column + length]
        for j in range(length):
            bits[j, r] = np.uint32(source[j]) << shift


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
    """Codes of a tile's columns, still in fp32, to their rows."""
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
    """The fp16 number d with the least weighted squared error.

    The error is Σ weights · (values − d · integer)²; the integers lie between `low` and `high`.

    `values` and `weights` are `[groups, rows]`. The largest value, whatever its sign, meets the end of the range
    that is further from zero.
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
