"""Scale search and rounding to nearest in one pass over the weights.

Integer codes on a processor take `rounding.kernels`.

Arrays, not tensors: what only needs these loops runs without torch. Floats, other devices, and errors weighed by whole
blocks of a Hessian take torch's operations in `grid`. Both try the same ranges; which of two is kept can differ
where their errors agree to a millionth. The bound is tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE

SEARCHES = ("absmax", "mse", "hessian")
# Shares of the whole range that can be tried.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(-2, 22))
_WHOLE = SHRINKS.index(1.0)
# Weights of a piece: fewer keep more threads busy.
ROUNDED_AT_ONCE = 1 << 19
# Bits of fp32's mantissa that a scale's type lacks.
_DROPPED = {"bf16": 16, "fp16": 13, "fp32": 0}
Array = NDArray[np.float32]
RoundedGroups = tuple[Array, Array, NDArray[np.uint8], float, float]


def is_compiled(scheme: QuantScheme, device: str = "cpu") -> bool:
    """Whether the compiled loops find a scheme's grid."""
    return scheme.type == "int" and device == "cpu"


def is_one_pass(scheme: QuantScheme, wide: int, device: str = "cpu") -> bool:
    """Whether the compiled loops also round onto the grid.

    For that, each row of `wide` weights has scales of its own, and whole groups.
    """
    return is_compiled(scheme, device) and scheme.per_row and wide % scheme.group_length(wide) == 0


def numbers_to_try(every: bool) -> list[int]:
    """Numbers of the `SHRINKS` that all groups try, the whole range first.

    The whole range is kept where no other is better.

    Every second one, as the neighbours of the best follow: a thousandth more squared error than with all of them. It
    would be a hundredth where inputs weigh the errors, as few weights count for most of it, and nearly so with FP8,
    whose steps grow with the values, so that neighbouring ranges have little in common: `every` one is for these.
    """
    others = range(0, len(SHRINKS), 1 if every else 2)
    return [_WHOLE, *(number for number in others if number != _WHOLE)]


def round_groups(
    weight: NDArray, length: int, scheme: QuantScheme, search: bool, importance: Array | None = None,
    with_codes: bool = True,
) -> RoundedGroups:  # fmt: skip
    """Scales, zeros, codes, Σ δ² and Σ w² of a weight `[rows, in]`.

    Scales and zeros are fp32 `[rows, groups]`, codes uint8 `[rows, in]`.

    `length` neighbours share a scale, which covers their range, or after a search the share of it with the least
    Σ importance · δ². The weight is of any float type, bf16 the quickest, `importance` `[in]`. Without codes there
    are no sums.
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
    """The kind of range of a scheme, and its factors for each trial."""
    from qwen3_export.solve.rounding.kernels import ASYMMETRIC, SIGNED, SYMMETRIC

    if not scheme.symmetric:
        kind, factors = ASYMMETRIC, [*SHRINKS]
    elif scheme.signed_scales:
        kind, factors = SIGNED, [-shrink / scheme.midpoint for shrink in SHRINKS]
    else:
        kind, factors = SYMMETRIC, [shrink * 2 / scheme.max_code for shrink in SHRINKS]
    return kind, np.array(factors, np.float32)
