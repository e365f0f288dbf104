"""GPTQ (Frantar et al. 2022): round columns one by one, let the rest make up for each error.

    min over codes of tr((W − Q) H (W − Q)ᵀ),   H = XᵀX / n + λI,   λ = percdamp · mean diag H

    U = upper Cholesky factor of H⁻¹
    for each column j:   q_j = round(w_j)         e = (w_j − q_j) / U_jj
                         W_:,k −= e · U_jk        for all k > j

Scales are searched before the solve by the diag(H)-weighted error and stay fixed. `act_order` visits
columns by falling diag H; the order changes the solve, never the layout, so no `g_idx` is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.core.recipe import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import Workers
from qwen3_export.solve.grid import Grid, find_grid, round_to
from qwen3_export.solve.method import Group, Solved, assemble, check_finite, ratio, row_pieces

NEEDS_INPUTS = True
_BLOCK = 128


@dataclass(frozen=True)
class Options:
    """`percdamp`: damping as a share of the mean Hessian diagonal. `act_order`: solve the columns
    with the largest inputs first. `scale_search`: `mse` or `absmax`."""

    percdamp: float = 0.01
    act_order: bool = True
    scale_search: str = "mse"


@dataclass(frozen=True)
class Factor:
    """The damped inverse Hessian's upper Cholesky factor, in solving order."""

    order: Tensor
    upper: Tensor


def solve(group: Group, options: Options, pool: Workers) -> dict[str, Solved]:
    """Solve all linears of the group against their common Hessian; error = tr(ΔHΔᵀ) / tr(WHWᵀ)."""
    hessian = group.hessian
    if hessian is None:
        raise ValueError("GPTQ was called without inputs")
    first = next(iter(group.weights))
    if not torch.isfinite(hessian).all():
        raise RecipeError(f"{first}: its inputs hold NaN or infinity", "the checkpoint is damaged, or its config wrong")
    factor = factorise(hessian, options.percdamp, options.act_order, first)
    solved = {}
    for name, weight in group.weights.items():
        check_finite(name, weight)

        def piece(rows: slice, weight: Tensor = weight, name: str = name) -> tuple[Grid, Tensor, float, float]:
            return _solve_rows(weight[rows], group.schemes[name], hessian, factor, options.scale_search)

        pieces = pool.map(piece, row_pieces(weight))
        tensor = assemble(name, [p[0] for p in pieces], [p[1] for p in pieces])
        solved[name] = Solved(tensor, ratio(sum(p[2] for p in pieces), sum(p[3] for p in pieces)))
    return solved


def _solve_rows(
    weight: Tensor, scheme: QuantScheme, hessian: Tensor, factor: Factor, search: str
) -> tuple[Grid, Tensor, float, float]:
    grid = find_grid(weight, scheme, search, hessian.diagonal())
    full = grid.columns(weight.shape[1])
    codes = round_columns(weight, full, factor)
    delta = (codes - full.zeros) * full.scales - weight
    error, total = (float(((m @ hessian) * m).double().sum()) for m in (delta, weight))
    return grid, codes, error, total


def factorise(hessian: Tensor, percdamp: float, act_order: bool, name: str) -> Factor:
    """Order the columns, damp, invert, factorise: fp32, or fp64 when fp32 is not enough.

    A column that no input ever reached gets a unit diagonal: it is rounded and compensates nothing.
    """
    diagonal = hessian.diagonal().clone()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    damped = hessian[order][:, order]
    mean = diagonal.mean()
    extra = torch.where(diagonal[order] == 0, torch.ones_like(diagonal), percdamp * mean)
    damped.diagonal().add_(extra)
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(damped.to(dtype))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and torch.isfinite(upper).all():
            return Factor(order, upper.float())
    raise RecipeError(
        f"{name}: the Hessian of its inputs is not positive definite with percdamp {percdamp}",
        "use more calibration text, or a larger percdamp in the recipe's options",
    )


def round_columns(weight: Tensor, grid: Grid, factor: Factor) -> Tensor:
    """Codes `[out, in]` in fp32; `grid` has one entry per column."""
    # Columns are rows here, so that the innermost work is on contiguous memory.
    rest = weight.T[factor.order].contiguous()
    scales, zeros = grid.scales.T[factor.order], grid.zeros.T[factor.order]
    codes = torch.empty_like(rest)
    count, upper = len(rest), factor.upper
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        errors = torch.empty_like(rest[begin:end])
        for j in range(begin, end):
            codes[j] = round_to(rest[j], scales[j], zeros[j], grid.scheme.max_code)
            error = (rest[j] - (codes[j] - zeros[j]) * scales[j]) / upper[j, j]
            rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
            errors[j - begin] = error
        rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.T.contiguous()
