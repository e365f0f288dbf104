"""Linears multiplied as integers, where a processor does that faster than fp32.

    x ≈ t q               q: integers of 16 bits, t: one scale per token and group
    y = Σ over groups of  t s (Σ q (c − m) − (z − m) Σ q)       c codes, s scales, z zeros, m the midpoint

The sums in brackets are exact. Rounding changes an input by at most 1 / 65534 of the group's largest input, a hundredth
of the change that bf16 makes to that largest one. A linear that is not quantized is multiplied in the same way, with
weights rounded to twelve bits and inputs to fourteen: the error is a fifth of that of products in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model import vectors as v
from qwen3_export.model.compiled import ROUNDER, Array, compiled

# Tokens and outputs that are multiplied together, and inputs between two turns of the loop.
_TOKENS, _OUTPUTS, _TURN = 4, 16, 8
# Inputs of a panel of codes that stay in the nearest cache for all tokens.
_INPUTS = 1024
# The longest group, and what its largest input is rounded to, so that sums fit into 32 bits: with codes of up to eight
# bits, and with weights rounded to twelve.
_LONGEST, _OF_CODES, _OF_WEIGHTS = 128, 32767, (8191, 2047)


def _build(
    b: Any, x: Any, width: Any, codes: Any, turns: Any, groups: Any, zeros: Any, scales: Any, steps: Any, sums: Any,
    next_token: Any, out: Any, row: Any,
) -> None:  # fmt: skip
    """The instructions of `_add_tile`."""
    halves = range(2)  # Outputs lie in two registers.

    def turn(_: Any, carried: Any) -> Any:
        *found, x, codes = carried
        rows = [v.ahead(b, x, width, token) for token in range(_TOKENS)]
        for pair in range(_TURN // 2):
            weights = [v.load(b, v.ahead(b, codes, 64 * pair + 32 * half), v.SHORTS) for half in halves]
            for token in range(_TOKENS):
                inputs = v.spread(b, v.load(b, v.ahead(b, rows[token], 4 * pair), v.INT32), v.SHORTS)
                for half in halves:
                    place = 2 * token + half
                    found[place] = b.add(found[place], v.pairs_of_shorts(b, inputs, weights[half]))
        return [*found, v.ahead(b, x, 2 * _TURN), v.ahead(b, codes, 2 * _OUTPUTS * _TURN)]

    def group(number: Any, carried: Any) -> Any:
        *found, x, codes = v.repeat(b, turns, [v.same(v.INTS, 0)] * (2 * _TOKENS) + carried, turn)
        for token in range(_TOKENS):
            of_token = b.add(b.mul(next_token, v.ADDRESS(token)), b.mul(number, v.ADDRESS(4)))
            step = v.spread(b, v.load(b, v.ahead(b, steps, of_token), v.FP32), v.FLOATS)
            total = v.spread(b, v.load(b, v.ahead(b, sums, of_token), v.INT32), v.INTS)
            for half in halves:
                of_weight = b.add(b.mul(number, v.ADDRESS(4 * _OUTPUTS)), v.ADDRESS(32 * half))
                exact = b.sub(found[2 * token + half], b.mul(total, v.load(b, v.ahead(b, zeros, of_weight), v.INTS)))
                scale = b.fmul(step, v.load(b, v.ahead(b, scales, of_weight), v.FLOATS))
                place = v.ahead(b, v.ahead(b, out, row, token), 32 * half)
                v.store(b, b.fadd(v.load(b, place, v.FLOATS), b.fmul(b.sitofp(exact, v.FLOATS), scale)), place)
        return [x, codes]

    v.repeat(b, groups, [x, codes], group)


@v.inserted
def _add_tile(
    _context: Any, x: Any, width: Any, codes: Any, turns: Any, groups: Any, zeros: Any, scales: Any,
    steps: Any, sums: Any, next_token: Any, out: Any, row: Any,
) -> Any:  # fmt: skip
    """Add products of `_TOKENS` rows of integers and `_OUTPUTS` rows of weights to `out`.

    Rows of `out` are `row` bytes apart, those of integers `width` bytes; each of the `groups` has `turns` times
    `_TURN` inputs. `steps` and `sums` of tokens are `next_token` bytes apart. Arrays are given by their addresses.
    """
    return v.addressed(12, _build)


@compiled
def _multiply(
    x: NDArray[np.int16], steps: Array, sums: NDArray[np.int32],
    codes: NDArray[np.int16], zeros: NDArray[np.int32], scales: Array, out: Array,
) -> None:  # fmt: skip
    """Add all products to `out`; for the shapes see `IntegerLinear` and `_round`."""
    tokens, inputs = x.shape
    groups = steps.shape[1]
    length = inputs // groups
    together = max(_INPUTS // length, 1)
    for panel in range(len(codes)):
        for first in range(0, groups, together):
            of_weight = panel * groups + first
            for token in range(0, tokens, _TOKENS):
                of_token = token * groups + first
                _add_tile(
                    x.ctypes.data + 2 * (token * inputs + first * length), 2 * inputs,
                    codes.ctypes.data + 2 * of_weight * length * _OUTPUTS,
                    length // _TURN, min(together, groups - first),
                    zeros.ctypes.data + 4 * of_weight * _OUTPUTS, scales.ctypes.data + 4 * of_weight * _OUTPUTS,
                    steps.ctypes.data + 4 * of_token, sums.ctypes.data + 4 * of_token, 4 * groups,
                    out.ctypes.data + 4 * (token * out.shape[1] + panel * _OUTPUTS), 4 * out.shape[1],
                )  # fmt: skip


@compiled
def _round(
    x: Array, factors: Array, largest: np.float32, made: NDArray[np.int16], steps: Array, sums: NDArray[np.int32]
) -> None:
    """Round rows `[tokens, in]`, times factors `[in]`, to integers.

    The scale of each group `[tokens, groups]` and the sum of its integers are left in `steps` and `sums`. Where an
    input of a group is NaN or infinite the scale is NaN.
    """
    row = np.empty(x.shape[1] // steps.shape[1], np.float32)
    tokens, groups = len(x), steps.shape[1]
    length = x.shape[1] // groups
    for t in range(tokens):
        for g in range(groups):
            out = made[t, g * length : (g + 1) * length]
            for i in range(length):
                row[i] = x[t, g * length + i] * factors[g * length + i]
            most, bad = np.float32(0.0), np.float32(0.0)
            for i in range(length):
                size = abs(row[i])
                most = size if size > most else most
            for i in range(length):
                bad += row[i] - row[i]
            inverse = largest / most if most > 0 else np.float32(0.0)
            total = np.int32(0)
            for i in range(length):
                whole = np.int32((row[i] * inverse + ROUNDER) - ROUNDER)
                out[i] = np.int16(whole)
                total += whole
            steps[t, g], sums[t, g] = most / largest + bad, total


@dataclass(frozen=True)
class IntegerLinear:
    """A linear `[out, in]` in the order in which it is multiplied.

    Outputs are in panels of 16; the last panel is padded. `codes` int16 `[panels, in / 2, 16, 2]` and `zeros` int32
    `[panels, groups, 16]` have the midpoint subtracted; `scales` are fp32 of the shape of `zeros`. Inputs are
    multiplied by `factors` fp32 `[in]` and then rounded so that the largest of a group becomes `largest`.
    """

    out_features: int
    codes: NDArray[np.int16]
    zeros: NDArray[np.int32]
    scales: Array
    factors: Array
    largest: int

    def product(self, x: Tensor) -> Tensor:
        """`x @ weight.T` of fp32 inputs `[…, in]`; NaN for inputs not finite."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        tokens, (panels, groups) = len(rows), self.scales.shape[:2]
        filled = -(-tokens // _TOKENS) * _TOKENS
        integers = torch.zeros(filled, rows.shape[1], dtype=torch.int16).numpy()
        steps, sums = np.zeros((filled, groups), np.float32), np.zeros((filled, groups), np.int32)
        _round(rows.numpy(), self.factors, np.float32(self.largest), integers, steps, sums)
        out = torch.zeros(filled, panels * _OUTPUTS)
        _multiply(integers, steps, sums, self.codes, self.zeros, self.scales, out.numpy())
        return out[:tokens, : self.out_features].reshape(*x.shape[:-1], self.out_features)


def from_codes(tensor: QuantizedTensor) -> IntegerLinear | None:
    """A quantized tensor as an integer linear; None where it does not fit."""
    scheme, width = tensor.scheme, tensor.shape[1]
    length = scheme.group_length(width)
    fits = scheme.type == "int" and scheme.per_row and tensor.g_idx is None and not scheme.activations
    if not fits or width % length or (group := _group(length)) is None:
        return None
    zeros = np.full(tensor.scales.shape, scheme.midpoint) if tensor.zeros is None else tensor.zeros
    shifts, scales = (np.repeat(each, length // group, 1) for each in (zeros, tensor.scales32))
    codes = tensor.codes.astype(np.int16) - np.int16(scheme.midpoint)
    return _in_panels(codes, shifts.astype(np.int32) - scheme.midpoint, scales, np.ones(width, np.float32), _OF_CODES)


def from_weight(weight: Tensor) -> IntegerLinear | None:
    """Any weight `[out, in]` in twelve bits, one scale per row and group.

    None where no group fits. Often the weights of an input channel are small because its inputs are large, or the
    reverse; such channels would leave few bits to the others of their group. So every column is scaled by a power of
    two to about one, and the inputs by its inverse.
    """
    out_features, width = weight.shape
    if (group := _group(width)) is None:
        return None
    sizes = weight.abs().amax(0)
    factors = torch.exp2(torch.where(sizes > 0, sizes, 1.0).log2().floor()).numpy()
    cells = (weight.numpy() / factors).reshape(out_features, -1, group)
    scales = np.abs(cells).max(-1) / np.float32(_OF_WEIGHTS[1])
    inverse = np.divide(np.float32(1.0), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(cells * inverse[..., None]).astype(np.int16).reshape(weight.shape)
    return _in_panels(codes, np.zeros(scales.shape, np.int32), scales, factors, _OF_WEIGHTS[0])


def _group(length: int) -> int | None:
    """The longest group of whole turns that divides `length`.

    Its sums must fit into 32 bits.
    """
    return next((size for size in range(_LONGEST, 0, -_TURN) if length % size == 0), None)


def _in_panels(
    codes: NDArray[np.int16], zeros: NDArray[np.int32], scales: Array, factors: Array, largest: int
) -> IntegerLinear:
    out_features, width = codes.shape

    def rows(values: NDArray) -> NDArray:
        more = [(0, -out_features % _OUTPUTS), (0, 0)]
        return np.pad(values, more).reshape(-1, _OUTPUTS, values.shape[1])

    pairs = rows(codes).reshape(-1, _OUTPUTS, width // 2, 2).transpose(0, 2, 1, 3)
    shifts, steps = (np.ascontiguousarray(rows(each).transpose(0, 2, 1)) for each in (zeros, scales))
    return IntegerLinear(out_features, np.ascontiguousarray(pairs), shifts, steps, factors, largest)
