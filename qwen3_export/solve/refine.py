"""Beyond plain GPTQ, on the same objective tr((Q − W) H (Q − W)ᵀ): three exact improvements.

    search    try scales for a group inside the solve, keep per row the one with the least GPTQ error
    descend   set each code to its exact minimiser given all others (coordinate descent), column by column
    refit     scales of a row by least squares for its codes: a small system per row

Everything is `[in, out]` in solving order here, so that the innermost work is on contiguous memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.grid import Grid, range_grid, round_scale, round_to

_BLOCK = 128
_SHRINK = [1.06 - 0.045 * step for step in range(14)]
_REFIT_ROWS = 128


def group_order(hessian: Tensor, length: int) -> Tensor:
    """Columns, whole groups together: groups by falling mass of diag H, columns inside likewise."""
    diagonal = hessian.diagonal().reshape(-1, length)
    groups = diagonal.sum(1).argsort(descending=True, stable=True)
    inside = diagonal.argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(len(diagonal), device=hessian.device)[:, None] * length)[groups].reshape(-1)


def search_columns(
    weight: Tensor, scheme: QuantScheme, order: Tensor, upper: Tensor, global_scale: float = 1.0
) -> tuple[Tensor, Grid]:
    """GPTQ with the scale search inside; `order` from `group_order`. Codes `[out, in]` and their grid."""
    length = scheme.group_length(weight.shape[1])
    rest, codes = weight.T[order].contiguous(), torch.empty_like(weight.T)
    groups = scheme.num_groups(weight.shape[1])
    scales, zeros = (torch.empty(groups, len(weight), device=weight.device) for _ in range(2))
    for begin in range(0, len(rest), length):
        end = begin + length
        triangle = upper[begin:end, begin:end]
        found, scale, zero, errors = _best_scale(rest[begin:end], scheme, triangle, global_scale)
        group = int(order[begin]) // length
        scales[group], zeros[group] = scale, zero
        codes[order[begin:end]] = found
        rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous(), Grid(scheme, scales.T.contiguous(), zeros.T.contiguous())


def _best_scale(
    part: Tensor, scheme: QuantScheme, upper: Tensor, global_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve one group `[length, out]` with every candidate scale; codes, scale, zero, errors of the best."""
    length, rows = part.shape
    candidates = [range_grid(part.T.unsqueeze(1), scheme, shrink, global_scale) for shrink in _SHRINK]
    scale, zero = (torch.cat([c[i].T for c in candidates]) for i in range(2))
    trial = part[:, None].expand(length, len(_SHRINK), rows).clone().reshape(length, -1)
    flat_scale, flat_zero = scale.reshape(-1), zero.reshape(-1)
    codes, errors = torch.empty_like(trial), torch.empty_like(trial)
    # Views are taken once: at a few rows, making them costs as much as the arithmetic.
    columns, solved, made, below = (m.unbind(0) for m in (trial, codes, errors, upper))
    for j, pivot in enumerate(upper.diagonal().tolist()):
        solved[j].copy_(round_to(columns[j], flat_scale, flat_zero, scheme))
        torch.sub(columns[j], (solved[j] - flat_zero).mul_(flat_scale), out=made[j]).div_(pivot)
        trial[j + 1 :].addr_(below[j][j + 1 :], made[j], alpha=-1)
    total = errors.square().sum(0).reshape(len(_SHRINK), rows)
    best = total.argmin(0)
    taken = best * rows + torch.arange(rows, device=part.device)
    return codes[:, taken], flat_scale[taken], flat_zero[taken], errors[:, taken]


def descend(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, order: Tensor) -> Tensor:
    """One pass of coordinate descent over all columns in `order`; new codes `[out, in]`.

    `hessian` is the damped one. The objective never rises: every step is an exact minimisation.
    """
    full = grid.columns(weight.shape)
    ordered = hessian[order][:, order]
    scales, zeros, target = (m.T[order] for m in (full.scales, full.zeros, weight))
    work = codes.T[order].clone()
    values = (work - zeros) * scales
    gradient, pivots = ordered @ (values - target), ordered.diagonal().tolist()
    for begin in range(0, len(work), _BLOCK):
        end = min(begin + _BLOCK, len(work))
        local, steps = gradient[begin:end].clone(), torch.empty_like(work[begin:end])
        block = ordered[begin:end, begin:end]
        # Views are taken once: at a few rows, making them costs as much as the arithmetic.
        views = [m[begin:end].unbind(0) for m in (values, scales, zeros, work)]
        slopes, moves, curves = local.unbind(0), steps.unbind(0), block.unbind(1)
        for j, (value, scale, zero, kept) in enumerate(zip(*views, strict=True)):
            code = round_to(value - slopes[j] / pivots[begin + j], scale, zero, grid.scheme)
            torch.sub(code, kept, out=moves[j]).mul_(scale)
            kept.copy_(code)
            local.addr_(curves[j], moves[j])
        gradient.addmm_(ordered[:, begin:end], steps)
    result = torch.empty_like(work)
    result[order] = work
    return result.T.contiguous()


def refit_scales(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, global_scale: float = 1.0) -> Grid:
    """Scales that minimise the objective for these codes, rounded to storage; kept where they help a row."""
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
    units = codes.reshape(rows, groups, -1) - grid.zeros.unsqueeze(-1)
    spread = torch.zeros(rows, groups, size, device=weight.device)
    length = size // groups
    for group in range(groups):
        spread[:, group, group * length : (group + 1) * length] = units[:, group]
    through = (spread.reshape(-1, size) @ hessian).reshape(rows, groups, size)
    system = through @ spread.transpose(1, 2)
    wanted = (through @ weight.unsqueeze(-1)).squeeze(-1)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-20
    system = system + ridge * torch.eye(groups, device=weight.device)
    solved = torch.linalg.solve(system.double(), wanted.double()).float()
    # A scale that would change its sign or vanish stays as it was.
    usable = torch.where(solved / grid.scales > 0.25, solved, grid.scales)
    scales = round_scale(usable, grid.scheme, global_scale)

    def error(candidate: Tensor) -> Tensor:
        return ((system @ candidate.unsqueeze(-1)).squeeze(-1) * candidate).sum(1) - 2 * (wanted * candidate).sum(1)

    return torch.where((error(scales) < error(grid.scales)).unsqueeze(-1), scales, grid.scales)
