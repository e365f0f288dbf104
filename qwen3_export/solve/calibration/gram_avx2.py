"""Gram sums with AVX2, of inputs rounded to seven-bit integers.

They take 1 / 2.5 of the time of fp32.

    p = round((x − c) / s) + 64    from 1 to 127; s is the largest |x − c| of some rows divided by 63

One instruction multiplies 32 unsigned with 32 signed bytes and adds neighbouring products in 16 bits. With seven bits
on both sides two such sums can be added without overflow. Four tokens of a column lie side by side:

    values  uint8 [blocks, panels, 128, 16, 4]    a block is 512 tokens, a panel 16 columns, padded with 64
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.model import vectors as v
from qwen3_export.model.compiled import ROUNDER, Array, compiled

LARGEST = 63
ZERO = 64
BLOCK, PANEL = 512, 16
# Products of so many tokens fit into 32 bits in any case; it is the longest context of any Qwen3.
MOST_TOKENS = 1 << 18
_FOUR = 4
_LINE = _FOUR * PANEL


def _build(b: Any, left: Any, right: Any, turns: Any, out: Any, row: Any) -> None:
    """The instructions of `_add_tile`."""
    halves = range(2)  # Columns of the right lie in two registers.

    def turn(_: Any, carried: Any) -> Any:
        *found, left, right = carried
        theirs = [
            [
                b.sub(v.load(b, v.ahead(b, right, _LINE * line + 32 * half), v.BYTES), v.same(v.BYTES, ZERO))
                for half in halves
            ]
            for line in range(2)
        ]
        for column in range(_FOUR):
            ours = [
                v.spread(b, v.load(b, v.ahead(b, left, _LINE * line + 4 * column), v.INT32), v.BYTES)
                for line in range(2)
            ]
            for half in halves:
                sums = [v.pairs_of_bytes(b, ours[line], theirs[line][half]) for line in range(2)]
                place = 2 * column + half
                found[place] = b.add(found[place], v.pairs_of_shorts(b, b.add(*sums), v.same(v.SHORTS, 1)))
        return [*found, v.ahead(b, left, 2 * _LINE), v.ahead(b, right, 2 * _LINE)]

    *found, _, _ = v.repeat(b, turns, [v.same(v.INTS, 0)] * (2 * _FOUR) + [left, right], turn)
    for column in range(_FOUR):
        for half in halves:
            place = v.ahead(b, v.ahead(b, out, row, column), 32 * half)
            v.store(b, b.add(v.load(b, place, v.INTS), found[2 * column + half]), place)


@v.inserted
def _add_tile(_context: Any, left: Any, right: Any, turns: Any, out: Any, row: Any) -> Any:
    """Add the products of four columns with a panel to four output rows.

    They are summed over `turns` times eight tokens, with 64 subtracted from the right side. Rows of `out` are `row`
    bytes apart. Arrays are given by their addresses.
    """
    return v.addressed(5, _build)


@compiled
def _multiply(left: NDArray[np.uint8], right: NDArray[np.uint8], first: int, out: NDArray[np.int32]) -> None:
    """Add Σ p (q − 64) to `out`, for columns of two matrices.

    These are the first columns of the left matrix, and those of the right one from panel `first` on.
    """
    size = BLOCK * PANEL
    for block in range(len(left)):
        for i in range(len(out) // PANEL):
            ours = left.ctypes.data + (block * left.shape[1] + i) * size
            for j in range(out.shape[1] // PANEL):
                theirs = right.ctypes.data + (block * right.shape[1] + first + j) * size
                for column in range(0, PANEL, _FOUR):
                    place = (i * PANEL + column) * out.shape[1] + j * PANEL
                    _add_tile(ours + column * _FOUR, theirs, BLOCK // 8, out.ctypes.data + 4 * place, 4 * out.shape[1])


def multiply(
    left: NDArray[np.uint8], right: NDArray[np.uint8], rows: int, columns: slice
) -> tuple[int, NDArray[np.int32]]:
    """Σ p (q − 64) for some columns of two matrices.

    These are the first `rows` columns of the left matrix and `columns` of the right one. The result consists of whole
    panels, so it may have more columns than asked for; the number of its first column is returned with it.
    """
    first, last = columns.start // PANEL, -(-columns.stop // PANEL)
    products = np.zeros((-(-rows // PANEL) * PANEL, (last - first) * PANEL), np.int32)
    _multiply(left, right, first, products)
    return columns.start - first * PANEL, products


@compiled
def put(x: Array, center: Array, inverse: Array, place: int, words: NDArray[np.int32], sums: NDArray[np.int32]) -> None:
    """Round inputs `[tokens, n]` and put them into panels, from token `place` on.

    The sums of the integers are added to `sums`. `words` is `values` seen as integers of four bytes, so that four
    tokens of a column are written at once.
    """
    tokens, size = x.shape
    four = np.zeros(words.shape[1] * PANEL, np.int32)
    for t in range(tokens):
        at = place + t
        shift = np.int32(8 * (at % _FOUR))
        for i in range(size):
            whole = np.int32(((x[t, i] - center[i]) * inverse[i] + ROUNDER) - ROUNDER)
            sums[i] += whole
            # A negative byte borrows from the next one; adding to the 64s that are already there gives it back.
            four[i] += whole << shift
        if at % _FOUR == _FOUR - 1 or t == tokens - 1:
            block, line = at // BLOCK, at % BLOCK // _FOUR
            for panel in range(words.shape[1]):
                for i in range(PANEL):
                    words[block, panel, line, i] += four[panel * PANEL + i]
            four[:] = 0


@compiled
def add_scaled(
    total: Array,
    begin: int,
    products: NDArray[np.int32],
    offset: int,
    sums: NDArray[np.int32],
    left: Array,
    right: Array,
) -> None:
    """`total[:, begin:] += left · (products − 64 · sums) · right`.

    Columns of the products count from `offset` on.
    """
    for i in range(len(total)):
        for j in range(len(right)):
            exact = products[i, offset + j] - ZERO * sums[j]
            total[i, begin + j] += np.float32(exact) * left[i] * right[j]
