"""The compiled inner loops of GPTQ, for integers, floats and codebooks.

They go column by column, for a few output rows at a time; everything is `[columns, rows]` in solving order. With only a
few rows, calling torch for every column would take a hundred times as long. The loops do not hold Python's lock, so
that pieces run in parallel.

Every operation is one that torch would perform, in fp32: a division, a rounding half to even, a clamp, and
multiplications whose products are rounded before they are added. They are compiled once for each kind of codes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from qwen3_export.model.compiled import Array, compiled
from qwen3_export.model.tiles import TILE
from qwen3_export.solve.rounding.kernels import code_of

_ZERO = np.float32(0.0)
# A codebook of sixteen numbers, in order, with the fifteen middles between them.
Book = tuple[Array, Array]
# A format of floats: the largest, the least normal number, the step below it, and the bits of fp32's mantissa that the
# format lacks.
Format = tuple[np.float32, np.float32, np.float32, int]
# What codes are: integers from 0 to this one, or numbers of a format or codebook.
Codes = np.float32 | Format | Book


def _code(value: Any, scale: Any, zero: Any, codes: Any) -> Any:
    """The code nearest to a value, in fp32.

    Floats and codebooks have no zero point.
    """
    if isinstance(codes, np.float32):
        return _of_integers(value, scale, zero, codes)
    return (_of_book if len(codes) == 2 else _of_floats)(value, scale, zero, codes)


def _of_integers(value: Any, scale: Any, zero: Any, codes: Any) -> Any:
    return code_of(value, scale, zero, codes)


def _of_floats(value: Any, scale: Any, zero: Any, codes: Any) -> Any:
    """Round the mantissa's bits half to even; below the normal numbers, steps are alike."""
    largest, normal, step, lacks = codes
    unit = value / scale
    unit = unit if unit < largest else largest
    unit = unit if unit > -largest else -largest
    if abs(unit) < normal:
        return np.rint(unit / step) * step
    bits = np.int64(np.float32(unit).view(np.int32))
    bits = ((bits + (1 << (lacks - 1)) - 1 + ((bits >> lacks) & 1)) >> lacks) << lacks
    return np.int32(bits).view(np.float32)


def _of_book(value: Any, scale: Any, zero: Any, codes: Any) -> Any:
    """Count the middles below: of two numbers as near, the lesser."""
    unit, place = value / scale, 0
    for step in (8, 4, 2, 1):
        place += step if unit > codes[1][place + step - 1] else 0
    return codes[0][place]


@overload(_code, jit_options={"error_model": "numpy"})
def _compiled_code(value: Any, scale: Any, zero: Any, codes: Any) -> Any:
    if isinstance(codes, numba.types.Float):
        return _of_integers
    return _of_book if len(codes) == 2 else _of_floats


@compiled
def _load(values: Array, begin: int, wide: int, work: Array) -> None:
    """Copy the columns of some rows into a tile."""
    for j in range(len(values)):
        for r in range(wide):
            work[j, r] = values[j, begin + r]


@compiled
def _spread(errors: Array, shares: Array, j: int, work: Array) -> None:
    """`work[k] -= shares[j, k] · errors[j]` for all columns k after j.

    Columns of the same four are changed at once. The others are changed when the four are done, so that they are read
    and written a quarter as often.
    """
    last = j - j % 4 + 3
    for k in range(j + 1, min(last + 1, len(work))):
        share = shares[j, k]
        for r in range(TILE):
            work[k, r] -= share * errors[j, r]
    if j == last:
        for k in range(last + 1, len(work)):
            a, b, c, d = shares[j - 3, k], shares[j - 2, k], shares[j - 1, k], shares[j, k]
            for r in range(TILE):
                work[k, r] -= (a * errors[j - 3, r] + b * errors[j - 2, r]) + (c * errors[j - 1, r] + d * errors[j, r])


@compiled
def round_block(
    rest: Array, scales: Array, zeros: Array, upper: Array, numbers: Codes, codes: Array, errors: Array
) -> None:
    """GPTQ's recursion over one block of columns `[n, rows]` against U `[n, n]`.

    Fills codes and errors e.
    """
    columns, rows = rest.shape
    work, made = np.zeros((columns, TILE), np.float32), np.zeros((columns, TILE), np.float32)
    for begin in range(0, rows, TILE):
        wide = min(TILE, rows - begin)
        _load(rest, begin, wide, work)
        for j in range(columns):
            for r in range(wide):
                value, scale, zero = work[j, r], scales[j, begin + r], zeros[j, begin + r]
                code = _code(value, scale, zero, numbers)
                codes[j, begin + r] = code
                made[j, r] = (value - (code - zero) * scale) / upper[j, j]
                errors[j, begin + r] = made[j, r]
            _spread(made, upper, j, work)


@compiled
def search_block(
    part: Array, scales: Array, zeros: Array, upper: Array, numbers: Codes, codes: Array, errors: Array
) -> NDArray[np.int64]:
    """Solve one group `[n, rows]` with every candidate scale and zero point `[candidates, rows]`.

    Fills `codes` and `errors` of each row's best candidate, the first with the least Σ e², and returns its number.
    """
    columns, rows = part.shape
    chosen = np.zeros(rows, np.int64)
    work, tried = np.zeros((columns, TILE), np.float32), np.zeros((columns, TILE), np.float32)
    made = np.zeros((columns, TILE), np.float32)
    kept = np.zeros((2, columns, TILE), np.float32)
    least, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    scale, zero = np.ones(TILE, np.float32), np.zeros(TILE, np.float32)
    for begin in range(0, rows, TILE):
        wide = min(TILE, rows - begin)
        least[:] = np.inf
        for candidate in range(len(scales)):
            for r in range(wide):
                scale[r], zero[r] = scales[candidate, begin + r], zeros[candidate, begin + r]
            _load(part, begin, wide, work)
            total[:] = _ZERO
            for j in range(columns):
                for r in range(TILE):
                    value = work[j, r]
                    code = _code(value, scale[r], zero[r], numbers)
                    tried[j, r] = code
                    error = (value - (code - zero[r]) * scale[r]) / upper[j, j]
                    made[j, r] = error
                    total[r] += error * error
                _spread(made, upper, j, work)
            better = total < least
            for j in range(columns):
                for r in range(TILE):
                    kept[0, j, r] = tried[j, r] if better[r] else kept[0, j, r]
                    kept[1, j, r] = made[j, r] if better[r] else kept[1, j, r]
            for r in range(wide):
                if better[r]:
                    least[r], chosen[begin + r] = total[r], candidate
        for j in range(columns):
            for r in range(wide):
                codes[j, begin + r], errors[j, begin + r] = kept[0, j, r], kept[1, j, r]
    return chosen


@compiled
def descend_block(
    values: Array, scales: Array, zeros: Array, block: Array, numbers: Codes,
    slopes: Array, codes: Array, steps: Array,
) -> None:  # fmt: skip
    """Set each code of a block `[n, rows]` to its minimiser, column by column.

    `block` `[n, n]` is the block's part of H, `values` are the present weights, and `slopes` the gradient, which is
    updated inside the block. Fills `steps` and changes `codes`.
    """
    columns, rows = values.shape
    work, made = np.zeros((columns, TILE), np.float32), np.zeros((columns, TILE), np.float32)
    for begin in range(0, rows, TILE):
        wide = min(TILE, rows - begin)
        _load(slopes, begin, wide, work)
        for j in range(columns):
            for r in range(wide):
                scale = scales[j, begin + r]
                best = values[j, begin + r] - work[j, r] / block[j, j]
                code = _code(best, scale, zeros[j, begin + r], numbers)
                step = (code - codes[j, begin + r]) * scale
                steps[j, begin + r] = step
                made[j, r] = -step
                codes[j, begin + r] = code
            _spread(made, block, j, work)
