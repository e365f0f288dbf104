"""Rounding weights onto ggml's types, with compiled loops.

There is one module per family of types. `affine_fit` and `affine_super` search for the first one's scales and mins,
`scale_fit` and `super_fit` for the others' scales; `grids` has the values that codes stand for.

    affine      q2_k q4_k q5_k q4_1 q5_1        scale · code + min
    symmetric   q3_k q6_k q4_0 q5_0 q2_0 q8_0   scale · (code − midpoint)
    codebook    iq4_nl iq4_xs mxfp4             scale · value of the code

The loops do not hold Python's lock, so that several threads can round different rows at the same time. The result of a
row does not depend on other rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.kquant import BlockType
from qwen3_export.core.process import uncollected, uninterrupted
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import E2M1, SCALE_TYPES, QuantizedTensor, block_specs
from qwen3_export.errors import MissingRuntimeError

# The least importance, relative to the mean: an input that calibration never saw must still count a little.
_FLOOR = 1e-6
_STRETCHES = {
    2: np.linspace(-1.0, 0.6, 13, dtype=np.float32),
    4: np.linspace(-1.2, 1.0, 12, dtype=np.float32),
    5: np.linspace(-1.2, 1.0, 12, dtype=np.float32),
}
# Values in units of the scale that the largest weight may get. Both signs, since codes reach further below zero.
_ENDS = {
    2: np.array([-2.4, -2.0, -1.6, -1.2, 1.0, 1.3, 1.6], np.float32),
    3: np.array([-4.6, -4.3, -4.0, -3.7, -3.4, -3.1, -2.8, 2.6, 2.9, 3.2, 3.5], np.float32),
    4: np.array([-8.8, -8.4, -8.0, -7.6, -7.2, -6.8, 6.4, 6.8, 7.2, 7.6], np.float32),
    5: np.array([-16.8, -16.4, -16.0, -15.6, -15.2, 14.6, 15.0, 15.4], np.float32),
    6: np.array([-32.6, -32.2, -31.8, -31.4, -31.0, -30.4, 30.2, 30.6, 31.0, 31.4], np.float32),
}
_IQ4_ENDS = np.array([-135, -127, -119, -111, -104, -97, -89, -83, 120, 113, 106, 98, 89, 83], np.float32)
_MORE_IQ4_ENDS = np.append(_IQ4_ENDS, np.array([-131, -123, -115], np.float32))


@dataclass(frozen=True)
class Rounded:
    """Some rounded rows: Σ δ², Σ w², the largest |δ| and |w|."""

    tensor: QuantizedTensor
    missed: float
    whole: float
    furthest: float
    largest: float


def import_loops() -> None:
    """Import the compiled loops, which must not meet Ctrl-C.

    Raises MissingRuntimeError where numba is not installed.
    """
    try:
        with uninterrupted(), uncollected():
            for family in ("affine", "symmetric", "codebook"):
                importlib.import_module(f"{__name__}.{family}")
    except ImportError as error:
        raise MissingRuntimeError(
            "rounding onto ggml's types needs numba", "pip install 'qwen3-export[gguf]'"
        ) from error


def round_rows(
    name: str, weight: NDArray, scheme: QuantScheme, importance: NDArray | None = None, *, quick: bool = False
) -> Rounded:
    """Some rows `[rows, in]` of any float type, rounded onto a type of `core.scheme.GGML_TYPES`.

    `importance` `[in]` weighs the squared errors; with None all count alike. If a weight is not finite, `whole` is not
    finite either. With `quick` scales are searched for less far, for solvers, which fit them to their own codes.
    """
    words, shift = _words(weight)
    rows, inputs = words.shape
    weights = _weights(importance, inputs)
    codes = np.empty((rows, inputs), np.uint8)
    fields: dict[str, Any]
    if (block := scheme.block_type) is not None:
        specs = block_specs(scheme, (rows, inputs))
        # The loops work on fp32 arrays, but all scales and mins in them are exact in fp16.
        fields = {
            key: np.empty(shape, np.float32 if dtype == np.float16 else dtype) for key, (dtype, shape) in specs.items()
        }
        sums = _round_blocks(words, shift, block, weights, quick, codes, fields)
        fields = {key: array.astype(specs[key][0], copy=False) for key, array in fields.items()}
    else:
        scales, sums = _round_plain(words, shift, scheme, weights, quick, codes)
        fields = {"scales": scales}
    return Rounded(QuantizedTensor(name, (rows, inputs), scheme, codes, **fields), *map(float, sums))


def _round_blocks(
    words: Any, shift: int, block: BlockType, weights: NDArray, quick: bool, codes: NDArray, fields: dict[str, NDArray]
) -> NDArray[np.float64]:
    from qwen3_export.ggml import affine, codebook, symmetric

    given = words, shift, weights, quick
    grouped = words, shift, block.group, weights, quick
    found: NDArray[np.float64]
    if block.values is not None:
        values, ends = np.array(block.values, np.float32), _IQ4_ENDS if quick else _MORE_IQ4_ENDS
        book = _book(values, 2, 512)
        if block.is_super:
            filled = [fields["scales"], fields["super_scales"]]
            found = codebook.round_super(*given, book, np.float32(32), ends, values, codes, *filled)
        else:
            found = codebook.round_simple(*given, book, ends, values, codes, fields["scales"])
    elif block.has_mins:
        top, stretches = np.float32((1 << block.num_bits) - 1), _STRETCHES[block.num_bits]
        if block.is_super:
            filled = [fields[key] for key in ("scales", "mins", "super_scales", "super_mins")]
            found = affine.round_super(*grouped, top, np.float32(block.max_min), stretches, codes, *filled)
        else:
            found = affine.round_simple(*given, top, stretches, codes, fields["scales"], fields["mins"])
    else:
        middle, ends = np.float32(1 << (block.num_bits - 1)), _ENDS[block.num_bits]
        if block.is_super:
            limit, filled = np.float32(-block.scale_range[0]), [fields["scales"], fields["super_scales"]]
            found = symmetric.round_super(*grouped, middle, limit, ends, codes, *filled)
        else:
            found = symmetric.round_simple(*grouped, middle, ends, codes, fields["scales"])
    return found


def _round_plain(
    words: Any, shift: int, scheme: QuantScheme, weights: NDArray, quick: bool, codes: NDArray
) -> tuple[NDArray, NDArray[np.float64]]:
    """Types that integer and float schemes describe: q2_0, q4_0, q8_0, mxfp4."""
    from qwen3_export.ggml import codebook, symmetric

    grid = scheme.grid((words.shape[0], words.shape[1]))
    if scheme.type == "float":
        exponents = np.empty(grid, np.uint8)
        sums = codebook.round_powers(words, shift, weights, _book(E2M1, 4, 64), codes, exponents)
        return exponents.view(SCALE_TYPES["e8m0"]), sums
    scales = np.empty(grid, np.float32)
    if scheme.num_bits == 8:
        sums = symmetric.round_q8_0(words, shift, codes, scales)
    else:
        middle, ends = np.float32(scheme.midpoint), _ENDS[scheme.num_bits]
        sums = symmetric.round_simple(words, shift, scheme.group_size, weights, quick, middle, ends, codes, scales)
    with np.errstate(over="ignore"):  # what becomes infinite is refused where it is stored
        return scales.astype(np.float16), sums


def _book(values: NDArray[np.float32], fine: int, cells: int) -> tuple[NDArray, NDArray[np.uint8], np.float32]:
    """The nearest of `values`, and its code, for each interval of 1 / `fine`."""
    middle = (np.arange(cells) - cells // 2 + 0.5) / fine
    codes = np.abs(middle[:, None] - values).argmin(1)
    return values[codes], codes.astype(np.uint8), np.float32(fine)


def _words(weight: NDArray) -> tuple[Any, int]:
    """The bits of the weights, and their shift in an fp32 word."""
    if weight.dtype == ml_dtypes.bfloat16:
        return np.ascontiguousarray(weight).view(np.uint16), 16
    return np.ascontiguousarray(weight, np.float32).view(np.uint32), 0


def _weights(importance: NDArray | None, inputs: int) -> NDArray[np.float32]:
    """Importance in fp32, scaled to mean 1 so that no sum overflows."""
    if importance is None:
        return np.ones(inputs, np.float32)
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return np.ones(inputs, np.float32)
    return np.maximum(importance / mean, _FLOOR).astype(np.float32)
