"""The squared errors of all tried ranges at once, looked up instead of computed.

Weights of a checkpoint are bf16 numbers, and so is the largest of a group: 8 bits of mantissa each.
Divided by a power of two that brings the largest between 1 and 2, a weight is one of a few hundred
numbers, and its error under any tried range follows from two of them:

    table[mantissa of the largest, weight, tried range] = (w − (code − zero) · scale)²

A group's errors are sums of rows of the table, which `embedding_bag` adds: about a nanosecond per
weight for all ranges, a twentieth of what rounding onto each of them takes. Weights so small that all
ranges round them to zero cost all the same and share a row of zeros.

The terms are those that fp32 arithmetic has anyway, only added in another order. Where the order
could decide, the group is left to the caller, so that the choice is the one of the plain loop.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE

_MANTISSAS = 128
_MAGNITUDE, _INFINITY = 0x7FFF, 0x7F80
# Longer sums could be ordered in too many ways to tell which range is best.
_LONGEST = 4096
_BUILDING = threading.Lock()
# (scheme, largest weights [n, 1, 1], weights [1, m, 1]) -> errors [n, m, ranges]
Errors = Callable[[QuantScheme, Tensor, Tensor], Tensor]


def stored_bits(weight: Tensor) -> Tensor | None:
    """The bf16 bits of a weight as int16, of the same shape; None when it is not exactly bf16."""
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16)
    if weight.dtype != torch.float32:
        return None
    words = weight.contiguous().view(torch.int32)
    return None if int((words & 0xFFFF).amax()) else (words >> 16).to(torch.int16)


def cheapest(
    groups: Tensor, scheme: QuantScheme, importance: Tensor | None, shrinks: tuple[float, ...], errors: Errors
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Largest weight, number of the best of `shrinks`, and whether that is certain, each `[rows, groups]`.

    `groups` `[rows, groups, weights]` is fp32 or bf16, `importance` broadcasts to it. None where no table
    serves: weights that are no bf16 numbers, zero points, signed scales, floats, another device.
    """
    plain = scheme.type == "int" and scheme.symmetric and not scheme.signed_scales
    if not plain or scheme.scale_dtype == "fp32" or groups.device.type != "cpu" or groups.shape[-1] > _LONGEST:
        return None
    bits = stored_bits(groups)
    if bits is None:
        return None
    shape, length = groups.shape[:2], groups.shape[-1]
    bits = bits.reshape(-1, length)
    largest = (bits & _MAGNITUDE).amax(-1)
    # Groups with the same mantissa one after another, so that its part of the table stays in the cache.
    order = (largest & (_MANTISSAS - 1)).argsort()
    weights = None if importance is None else importance.expand(groups.shape).reshape(-1, length)[order]
    table, octaves = _table(scheme, shrinks, errors)
    rows = _table_rows(bits.index_select(0, order), largest[order], octaves)
    found = torch.empty(len(order), len(shrinks))
    found[order] = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
    best, choice = found.min(-1)
    # Relative error of a sum of that many terms, at worst, and the weights that count in no row.
    slack, idle = (length + 4) * 2.0**-24, torch.full_like(best, length * 4.0 ** (1 - octaves))
    if importance is not None:
        idle *= importance.amax(-1).expand(shape).reshape(-1)
    certain = (found <= (best * (1 + 5 * slack) + 3 * slack * idle).unsqueeze(-1)).sum(-1) == 1
    value = (largest.to(torch.int32) << 16).view(torch.float32)
    # Scales of all ranges must scale with the weights: not be clipped to what can be stored.
    lowest, highest = (shrink * 2 / scheme.max_code for shrink in (min(shrinks), max(shrinks)))
    certain &= (value * lowest > SMALLEST_SCALE * 1.01) & (value * highest < LARGEST_SCALE * 0.99)
    return value.reshape(shape), choice.reshape(shape), certain.reshape(shape)


def _table_rows(bits: Tensor, largest: Tensor, octaves: int) -> Tensor:
    """Which row of the table each weight has, int32 of the shape of `bits` `[groups, weights]`."""
    half = octaves * _MANTISSAS + 1
    # Of the first number that the table knows, the bits less one; int16 holds the difference.
    base = ((largest & _INFINITY) - ((octaves - 1) * _MANTISSAS + 1)).unsqueeze(-1)
    rows = (bits & _MAGNITUDE).sub_(base).clamp_(min=0)
    # An arithmetic shift spreads the sign over all bits.
    rows += (bits >> 15).bitwise_and_(half)
    first = (largest & (_MANTISSAS - 1)).to(torch.int32) * (2 * half)
    return rows.to(torch.int32).add_(first.unsqueeze(-1))


def _table(scheme: QuantScheme, shrinks: tuple[float, ...], errors: Errors) -> tuple[Tensor, int]:
    with _BUILDING:
        return _build(scheme.num_bits, scheme.scale_dtype, shrinks, errors)


@lru_cache(maxsize=2)
def _build(bits: int, scale_dtype: str, shrinks: tuple[float, ...], errors: Errors) -> tuple[Tensor, int]:
    """The table `[mantissas * 2 * (octaves * 128 + 1), ranges]` and how many octaves of weights it knows."""
    scheme = QuantScheme(bits, scale_dtype=scale_dtype)
    # Half of the smallest scale: below, every range rounds to zero.
    octaves = 1 - math.floor(math.log2(0.99 * min(shrinks) / scheme.max_code))
    exponent = 127 * _MANTISSAS
    numbers = torch.arange(exponent - (octaves - 1) * _MANTISSAS, exponent + _MANTISSAS, dtype=torch.int32)
    weights = (numbers << 16).view(torch.float32)
    zero = torch.zeros(1)
    weights = torch.cat([zero, weights, zero, -weights]).reshape(1, -1, 1)
    largest = (torch.arange(exponent, exponent + _MANTISSAS, dtype=torch.int32) << 16).view(torch.float32)
    return errors(scheme, largest.reshape(-1, 1, 1), weights).flatten(0, 1), octaves
