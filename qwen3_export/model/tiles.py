"""Tiles: the columns of a few rows of weights, `[columns, rows]`.

The compiled loops of rounding work on tiles, so that every step is one operation on all rows at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model.compiled import compiled

# Rows of a tile: few enough for a group's columns to stay in the nearest cache.
TILE = 32


@compiled
def load(words: Any, shift: int, row: int, column: int, length: int, bits: NDArray[np.uint32]) -> None:
    """Read `length` columns of some rows into a tile.

    `words` `[rows, in]` are the weights' bits: fp32, or its upper halves where `shift` is 16; `bits` `[length, TILE]`
    are filled with the bits of fp32. Rows beyond the last one repeat it.
    """
    for r in range(TILE):
        source = words[min(row + r, len(words) - 1), column : column + length]
        for j in range(length):
            bits[j, r] = np.uint32(source[j]) << shift
