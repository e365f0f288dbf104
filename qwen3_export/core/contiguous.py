"""Arrays in the order in which files hold them, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.processors import processors

# Rows and columns that are moved together: both sides of the move fit a core's cache.
_TILE = 256
_SMALL = 1 << 18
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def contiguous(array: NDArray) -> NDArray:
    """The array in row-major order, itself where it is in that order.

    A large transposed matrix is moved tile by tile, on all processors: numpy's own copy takes a column of the source
    for each row, through the whole of it.

    >>> contiguous(np.arange(6).reshape(2, 3).T).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if array.ndim != 2 or array.flags.c_contiguous or array.nbytes < _SMALL or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array)
    # The bits, since copies of types that numpy does not have itself are slow.
    source = array.T.view(_WORDS[array.itemsize])
    moved = np.empty(array.shape, source.dtype)

    def move(begin: int) -> None:
        rows = source[begin : begin + _TILE]
        for column in range(0, rows.shape[1], _TILE):
            moved[column : column + _TILE, begin : begin + _TILE] = rows[:, column : column + _TILE].T

    with ThreadPoolExecutor(processors()) as pool:
        list(pool.map(move, range(0, len(source), _TILE)))
    return moved.view(array.dtype)
