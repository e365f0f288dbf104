"""Rounding to nearest in one pass over the weights: integer codes on a processor take `solve.range_kernels`.

Floats, other devices, and errors weighed by whole blocks of a Hessian take torch's operations in `solve.grid`. Both
try the same ranges; which of two is kept can differ where their errors agree to a millionth. The bound is tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE

# Bits of fp32's mantissa that a scale's type lacks.
_DROPPED = {"bf16": 16, "fp16": 13, "fp32": 0}
Found = tuple[Tensor, Tensor, Tensor, float, float]


def is_compiled(weight: Tensor, scheme: QuantScheme) -> bool:
    """Whether the compiled loops serve."""
    return scheme.type == "int" and weight.device.type == "cpu"


def round_groups(
    weight: Tensor, length: int, scheme: QuantScheme, shrinks: tuple[float, ...], importance: Tensor | None = None,
    with_codes: bool = True,
) -> Found:  # fmt: skip
    """Scales and zeros `[rows, groups]` in fp32, codes uint8 `[rows, in]`, Σ δ² and Σ w² of a weight `[rows, in]`.

    `length` neighbours share a scale; of `shrinks` of their range the one with the least Σ importance · δ² is kept,
    the first of equals. The weight is fp32 or bf16, `importance` `[in]`. Without codes there are no sums.
    """
    from qwen3_export.solve import range_kernels

    words, shift = _words(weight)
    rows, wide = words.shape
    scales = np.empty((rows, wide // length), np.float32)
    zeros = np.full_like(scales, scheme.midpoint)
    codes = np.empty((rows if with_codes else 0, wide), np.uint8)
    weights = np.ones(wide, np.float32) if importance is None else np.ascontiguousarray(importance.numpy())
    kind, factors = _factors(scheme, shrinks)
    storage = (_DROPPED[scheme.scale_dtype], np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))
    top = np.float32(scheme.max_code)
    missed, whole = range_kernels.round_groups(
        words, shift, length, weights, kind, factors, top, storage, scales, zeros, codes
    )
    return torch.from_numpy(scales), torch.from_numpy(zeros), torch.from_numpy(codes), missed, whole


def _words(weight: Tensor) -> tuple[Any, int]:
    """The bits of the weights, and how far up they belong in a word of fp32."""
    if weight.dtype == torch.bfloat16:
        return weight.contiguous().view(torch.int16).numpy().view(np.uint16), 16
    return weight.float().contiguous().numpy().view(np.uint32), 0


def _factors(scheme: QuantScheme, shrinks: tuple[float, ...]) -> tuple[int, Any]:
    """Which kind of range the scheme has, and what its ends are multiplied by for every tried one."""
    from qwen3_export.solve.range_kernels import ASYMMETRIC, SIGNED, SYMMETRIC

    if not scheme.symmetric:
        kind, factors = ASYMMETRIC, [*shrinks]
    elif scheme.signed_scales:
        kind, factors = SIGNED, [-shrink / scheme.midpoint for shrink in shrinks]
    else:
        kind, factors = SYMMETRIC, [shrink * 2 / scheme.max_code for shrink in shrinks]
    return kind, np.array(factors, np.float32)
