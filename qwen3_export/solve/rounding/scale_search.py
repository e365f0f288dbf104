"""Scale search and rounding to nearest in one pass over the weights.

For integer codes on a CPU it runs the compiled loops of `rounding.kernels` on numpy arrays, so that torch is not
needed. Floats, other devices, and errors weighed by whole blocks of a Hessian use torch in `rounding.grid`. Both try
the same ranges; they may keep different ones only where the errors agree to a millionth. A test holds that bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE

SEARCHES = ("absmax", "mse", "hessian")
# The shares of a group's whole range that can be tried.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(-2, 22))
_WHOLE = SHRINKS.index(1.0)
# Weights of a piece of work; smaller pieces keep more threads busy.
ROUNDED_AT_ONCE = 1 << 19
# How many bits of fp32's mantissa a scale's type lacks.
_DROPPED = {"bf16": 16, "fp16": 13, "fp32": 0}
Array = NDArray[np.float32]
RoundedGroups = tuple[Array, Array, NDArray[np.uint8], float, float]


def is_compiled(scheme: QuantScheme, device: str = "cpu") -> bool:
    """Whether the compiled loops find a scheme's grid."""
    return scheme.type == "int" and device == "cpu"


def is_one_pass(scheme: QuantScheme, wide: int, device: str = "cpu") -> bool:
    """Whether the compiled loops can also round onto the grid.

    They can where every row of `wide` weights has its own scales and only whole groups.
    """
    return is_compiled(scheme, device) and scheme.per_row and wide % scheme.group_length(wide) == 0


def numbers_to_try(every: bool) -> list[int]:
    """Indices of the `SHRINKS` that all groups try, the whole range first.

    Every second one is tried, and then the neighbours of the best: the squared error is a thousandth larger than with
    all of them. With `every`, all are tried. That is for errors weighed by inputs, where few weights make most of the
    error and the loss would be a hundredth, and for FP8, whose steps grow with the values, so that neighbouring ranges
    have little in common.
    """
    others = range(0, len(SHRINKS), 1 if every else 2)
    return [_WHOLE, *(number for number in others if number != _WHOLE)]


def round_groups(
    weight: NDArray, length: int, scheme: QuantScheme, search: bool, importance: Array | None = None,
    with_codes: bool = True,
) -> RoundedGroups:  # fmt: skip
    """Scales, zeros, codes, Σ δ² and Σ w² of a weight `[rows, in]`.

    Scales and zeros are fp32 `[rows, groups]`, codes uint8 `[rows, in]`. `length` neighbours share a scale. It covers
    their range, or after a search the share of that range with the least Σ importance · δ², where `importance` is
    `[in]`. The weight may have any float type; bf16 is the fastest. Without `with_codes` the codes and sums are left
    out.
    """
    from qwen3_export.solve.rounding import kernels

    words, shift = _words(weight)
    rows, wide = words.shape
    scales = np.empty((rows, wide // length), np.float32)
    zeros = np.full_like(scales, scheme.midpoint)
    codes = np.empty((rows if with_codes else 0, wide), np.uint8)
    weights = np.ones(wide, np.float32) if importance is None else np.ascontiguousarray(importance)
    kind, factors = _factors(scheme)
    order = np.array(numbers_to_try(importance is not None) if search else [_WHOLE])
    storage = (_DROPPED[scheme.scale_dtype], np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))
    top = np.float32(scheme.max_code)
    missed, whole = kernels.round_groups(
        words, shift, length, weights, kind, factors, order, top, storage, scales, zeros, codes
    )
    return scales, zeros, codes, missed, whole


def _words(weight: NDArray) -> tuple[Any, int]:
    """The bits of the weights, and their shift in an fp32 word."""
    if weight.dtype.name == "bfloat16":
        return np.ascontiguousarray(weight).view(np.uint16), 16
    return np.ascontiguousarray(weight, np.float32).view(np.uint32), 0


def _factors(scheme: QuantScheme) -> tuple[int, Any]:
    """The kind of range of a scheme, and the factors to try."""
    from qwen3_export.solve.rounding.kernels import ASYMMETRIC, SIGNED, SYMMETRIC

    if not scheme.symmetric:
        kind, factors = ASYMMETRIC, [*SHRINKS]
    elif scheme.signed_scales:
        kind, factors = SIGNED, [-shrink / scheme.midpoint for shrink in SHRINKS]
    else:
        kind, factors = SYMMETRIC, [shrink * 2 / scheme.max_code for shrink in SHRINKS]
    return kind, np.array(factors, np.float32)
