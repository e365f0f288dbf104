"""Values that a code can stand for, in units of the scale.

A grid is either the midpoint of evenly spaced codes (`symmetric`), or a table of given numbers (`codebook`). The loops
that search for a scale are compiled once for each of the two.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from qwen3_export.ggml.tiles import ONE, ZERO
from qwen3_export.model.compiled import Array, compiled

# A table: the nearest number of every interval, its code, and how many intervals lie in one unit.
Book = tuple[Array, NDArray[np.uint8], np.float32]
Grid = np.float32 | Book


@compiled
def cell(unit: np.float32, fine: np.float32, cells: int) -> Any:
    """The table's entry for a weight in units of the scale."""
    place = unit * fine + np.float32(cells // 2)
    place = place if place > ZERO else ZERO
    return np.int32(min(place, np.float32(cells - 1)))


def nearest(unit: Any, grid: Any) -> Any:
    """The value of the grid nearest to a weight in units of the scale."""
    return _of_codes(unit, grid) if isinstance(grid, np.float32) else _of_table(unit, grid)


def _of_codes(unit: Any, grid: Any) -> Any:
    code = np.rint(unit)
    code = code if code > -grid else -grid
    return code if code < grid - ONE else grid - ONE


def _of_table(unit: Any, grid: Any) -> Any:
    return grid[0][cell(unit, grid[2], len(grid[0]))]


@overload(nearest)
def _compiled_nearest(unit: Any, grid: Any) -> Any:
    return _of_codes if isinstance(grid, numba.types.Float) else _of_table
