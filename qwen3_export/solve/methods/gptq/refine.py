"""Scale search, coordinate descent and refit: three improvements on GPTQ's objective.

The objective is tr((Q − W) H (Q − W)ᵀ). Descent and refit never raise it.

    search    try scales for a group during the solve, keep for each row the one of least GPTQ error
    descend   set each code to its exact minimiser given all others (coordinate descent), column by column
    refit     fit the scales of a row to its codes by least squares, a small linear system per row

Everything is `[in, out]` in solving order, so that the innermost loops work on contiguous memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.methods.gptq.columns import descend_block, multiply, search_block
from qwen3_export.solve.rounding.grid import Grid, range_grid, round_scale

_BLOCK = 128
# Shares of a group's range to try. With few codes a much smaller range can be best, with many codes hardly.
_FEW = [1.06 - 0.03 * step for step in range(20)]
_MANY = [*(1.1 - 0.03 * step for step in range(13)), 0.64, 0.54]
_REFIT_ROWS = 128


def group_order(hessian: Tensor, length: int) -> Tensor:
    """An order of columns: groups, and columns inside them, by falling diag H."""
    diagonal = hessian.diagonal().reshape(-1, length)
    groups = diagonal.sum(1).argsort(descending=True, stable=True)
    inside = diagonal.argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(len(diagonal), device=hessian.device)[:, None] * length)[groups].reshape(-1)


def search_columns(
    weight: Tensor, scheme: QuantScheme, order: Tensor, upper: Tensor, global_scale: float = 1.0,
    matmul_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Grid]:  # fmt: skip
    """GPTQ with the scale search inside; returns codes `[out, in]` and their grid.

    `order` comes from `group_order`.
    """
    length = scheme.group_length(weight.shape[1])
    rest, codes = weight.T[order].contiguous(), torch.empty_like(weight.T)
    groups = scheme.num_groups(weight.shape[1])
    shrinks = torch.tensor(_MANY if scheme.num_bits > 3 else _FEW, device=weight.device).reshape(-1, 1, 1)
    scales, zeros = (torch.empty(groups, len(weight), device=weight.device) for _ in range(2))
    for begin in range(0, len(rest), length):
        end = begin + length
        # The range depends on nothing else.
        ends = torch.stack(torch.aminmax(rest[begin:end], dim=0), -1).unsqueeze(1)
        tried = [values.squeeze(-1) for values in range_grid(ends, scheme, shrinks, global_scale)]
        found, errors, best = search_block(rest[begin:end], tried[0], tried[1], upper[begin:end, begin:end], scheme)
        group = int(order[begin]) // length
        scales[group], zeros[group] = (values.gather(0, best.unsqueeze(0))[0] for values in tried)
        codes[order[begin:end]] = found
        rest[end:].sub_(multiply(upper[begin:end, end:].T, errors, matmul_dtype))
    return codes.T.contiguous(), Grid(scheme, scales.T.contiguous(), zeros.T.contiguous())


def descend(
    weight: Tensor, codes: Tensor, grid: Grid, ordered: Tensor, order: Tensor, matmul_dtype: torch.dtype = torch.float32
) -> Tensor:
    """One pass of coordinate descent over all columns; returns codes `[out, in]`.

    `ordered` is the damped Hessian in `order`. Every step is an exact minimisation, so the objective never rises.
    """
    full = grid.columns(weight.shape)
    scales, zeros, target, work = (m.T[order].contiguous() for m in (full.scales, full.zeros, weight, codes))
    values = (work - zeros) * scales
    gradient = multiply(ordered, values - target, matmul_dtype).float()
    for begin in range(0, len(work), _BLOCK):
        own = slice(begin, min(begin + _BLOCK, len(work)))
        block = ordered[own, own]
        steps = descend_block(values[own], scales[own], zeros[own], block, gradient[own], work[own], grid.scheme)
        gradient[own.stop :].add_(multiply(ordered[own.stop :, own], steps, matmul_dtype))
    result = torch.empty_like(work)
    result[order] = work
    return result.T.contiguous()


def refit_scales(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, global_scale: float = 1.0) -> Grid:
    """Scales that minimise the objective for these codes, rounded to storage.

    A row gets them only if they lower its error.
    """
    pieces = [
        _refit_rows(weight[i : i + _REFIT_ROWS], codes[i : i + _REFIT_ROWS], _rows(grid, i), hessian, global_scale)
        for i in range(0, len(weight), _REFIT_ROWS)
    ]
    return Grid(grid.scheme, torch.cat(pieces), grid.zeros)


def _rows(grid: Grid, begin: int) -> Grid:
    return Grid(grid.scheme, grid.scales[begin : begin + _REFIT_ROWS], grid.zeros[begin : begin + _REFIT_ROWS])


def _refit_rows(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, global_scale: float) -> Tensor:
    rows, size = weight.shape
    groups = grid.scales.shape[1]
    length, spread = size // groups, codes.reshape(rows, groups, -1) - grid.zeros.unsqueeze(-1)
    system, wanted = torch.empty(rows, groups, groups, device=weight.device), torch.empty_like(grid.scales)
    for group in range(groups):
        # A group's codes are zero outside of it, so only its own rows of H count.
        through = spread[:, group] @ hessian[group * length : (group + 1) * length]
        wanted[:, group] = (through * weight).sum(1)
        system[:, group] = through.reshape(rows, groups, length).mul_(spread).sum(2)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-20
    system = system + ridge * torch.eye(groups, device=weight.device)
    solved = torch.linalg.solve(system.double(), wanted.double()).float()
    # A scale that would change its sign or become zero is left as it is.
    usable = torch.where(solved / grid.scales > 0.25, solved, grid.scales)
    scales = round_scale(usable, grid.scheme, global_scale)

    def error(candidate: Tensor) -> Tensor:
        return ((system @ candidate.unsqueeze(-1)).squeeze(-1) * candidate).sum(1) - 2 * (wanted * candidate).sum(1)

    return torch.where((error(scales) < error(grid.scales)).unsqueeze(-1), scales, grid.scales)
