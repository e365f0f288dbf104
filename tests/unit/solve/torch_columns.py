"""GPTQ's loops over one block of columns in torch's operations, which the compiled ones must equal.

See `qwen3_export.solve.methods.gptq.columns`, whose functions have the same names, arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.rounding.grid import round_to


def round_block(
    rest: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    codes, errors, rest = torch.empty_like(rest), torch.empty_like(rest), rest.clone()
    for j, pivot in enumerate(upper.diagonal().tolist()):
        codes[j] = round_to(rest[j], scales[j], zeros[j], scheme)
        errors[j] = (rest[j] - (codes[j] - zeros[j]) * scales[j]) / pivot
        rest[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors


def search_block(
    part: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor]:
    tries, rows = scales.shape
    wide = part.repeat(1, tries)
    each = [values.reshape(-1).expand(len(part), -1) for values in (scales, zeros)]
    codes, errors = round_block(wide, each[0], each[1], upper, scheme)
    best = errors.square().sum(0).reshape(tries, rows).argmin(0)
    taken = best * rows + torch.arange(rows)
    return codes[:, taken], errors[:, taken], best


def descend_block(
    values: Tensor, scales: Tensor, zeros: Tensor, block: Tensor, slopes: Tensor, codes: Tensor, scheme: QuantScheme
) -> Tensor:
    steps, slopes = torch.empty_like(values), slopes.clone()
    for j, pivot in enumerate(block.diagonal().tolist()):
        code = round_to(values[j] - slopes[j] / pivot, scales[j], zeros[j], scheme)
        steps[j] = (code - codes[j]) * scales[j]
        codes[j] = code
        slopes.addr_(block[:, j], steps[j])
    return steps
