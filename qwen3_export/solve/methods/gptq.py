"""GPTQ (Frantar et al. 2022): round columns one by one, let the rest make up for each error.

    min over codes of tr((W − Q) H (W − Q)ᵀ),   H = XᵀX / n + λI,   λ = percdamp · mean diag H

    U = upper Cholesky factor of H⁻¹
    for each column j:   q_j = round(w_j)         e = (w_j − q_j) / U_jj
                         W_:,k −= e · U_jk        for all k > j

With `scale_search: mse` or `absmax` scales are chosen before the solve, by the diag(H)-weighted error, and
stay fixed; `solve` searches them group by group inside it. `act_order` visits columns by falling
diag H; the order changes the solve, never the layout, so no `g_idx` is written. The rungs beyond the
paper are in `solve.shift` and `solve.refine`.
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
from qwen3_export.solve.refine import descend, group_order, refit_scales, search_columns
from qwen3_export.solve.shift import prepare

NEEDS_INPUTS = True
_BLOCK = 128


@dataclass(frozen=True)
class Options:
    """Options of the recipe.

    `percdamp`: damping as a share of the mean Hessian diagonal. `act_order`: solve the columns with
    the largest inputs first. `scale_search`: `solve`, `mse` or `absmax`. `descent`: passes of
    coordinate descent afterwards, scales refitted between them. `target_shift`: aim at the original
    model's outputs, not at this layer's; the original then runs beside the quantized model.
    """

    percdamp: float = 0.01
    act_order: bool = True
    scale_search: str = "mse"
    descent: int = 0
    target_shift: bool = False


@dataclass(frozen=True)
class Factor:
    """The damped inverse Hessian's upper Cholesky factor, in solving order."""

    order: Tensor
    upper: Tensor


def needs_original(options: Options) -> bool:
    """The shift compares with the original model's activations."""
    return options.target_shift


def solve(group: Group, options: Options, pool: Workers) -> dict[str, Solved]:
    """Solve all linears of the group against their common Hessian; error = tr(ΔHΔᵀ) / tr(WHWᵀ).

    Raises RecipeError for inputs or weights that are not finite.
    """
    hessian = group.hessian
    if hessian is None:
        raise ValueError("GPTQ was called without inputs")
    first = next(iter(group.weights))
    if not torch.isfinite(hessian).all():
        raise RecipeError(f"{first}: its inputs hold NaN or infinity", "the checkpoint is damaged, or its config wrong")
    problems = {scheme: _problem(hessian, scheme, options, first) for scheme in set(group.schemes.values())}
    shift = None
    if options.target_shift and group.fitted is not None and group.held_out is not None:
        damping = _damping(group.fitted.hessian.diagonal(), options.percdamp)
        shift = prepare(group.fitted, group.held_out, damping)
    solved = {}
    for name, weight in group.weights.items():
        check_finite(name, weight)
        problem = problems[group.schemes[name]]
        target = weight if shift is None else shift.target(weight, pool)

        def piece(
            rows: slice, target: Tensor = target, problem: Problem = problem
        ) -> tuple[Grid, Tensor, float, float]:
            grid, codes = _solve_rows(target[rows], problem, options)
            return grid, codes, *_error(target[rows], grid, codes, hessian)

        pieces = pool.map(piece, row_pieces(weight))
        tensor = assemble(name, [p[0] for p in pieces], [p[1] for p in pieces])
        solved[name] = Solved(tensor, ratio(name, sum(p[2] for p in pieces), sum(p[3] for p in pieces)))
    return solved


@dataclass(frozen=True)
class Problem:
    """One Hessian for one scheme: its columns' order, factor, and damped form for the descent."""

    scheme: QuantScheme
    hessian: Tensor
    factor: Factor
    damped: Tensor | None


def _problem(hessian: Tensor, scheme: QuantScheme, options: Options, name: str) -> Problem:
    order = None
    if options.scale_search == "solve" and scheme.strategy == "group":
        order = group_order(hessian, scheme.group_length(len(hessian)))
    factor = factorise(hessian, options.percdamp, options.act_order, name, order)
    damped = None
    if options.descent:
        damped = hessian.clone()
        damped.diagonal().add_(_damping(hessian.diagonal(), options.percdamp))
    return Problem(scheme, hessian, factor, damped)


def _solve_rows(weight: Tensor, problem: Problem, options: Options) -> tuple[Grid, Tensor]:
    scheme, factor = problem.scheme, problem.factor
    if options.scale_search == "solve" and scheme.strategy == "group":
        codes, grid = search_columns(weight, scheme, factor.order, factor.upper)
    else:
        search = "mse" if options.scale_search == "solve" else options.scale_search
        grid = find_grid(weight, scheme, search, problem.hessian.diagonal())
        codes = round_columns(weight, grid.columns(weight.shape[1]), factor)
    for turn in range(options.descent):
        assert problem.damped is not None
        if turn > 0:
            grid = refit_scales(weight, codes, grid, problem.damped)
        codes = descend(weight, codes, grid, problem.damped, factor.order)
    return grid, codes


def _error(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> tuple[float, float]:
    """tr(ΔHΔᵀ) and tr(WHWᵀ) of some rows."""
    full = grid.columns(weight.shape[1])
    delta = (codes - full.zeros) * full.scales - weight
    error, total = (float(((m @ hessian) * m).double().sum()) for m in (delta, weight))
    return error, total


def _damping(diagonal: Tensor, percdamp: float) -> Tensor:
    """What is added to each diagonal element; one where no input ever arrived."""
    return torch.where(diagonal == 0, torch.ones_like(diagonal), percdamp * diagonal.mean())


def factorise(hessian: Tensor, percdamp: float, act_order: bool, name: str, order: Tensor | None = None) -> Factor:
    """Order the columns (unless `order` says how), damp, invert, factorise: fp32, or fp64 when needed.

    A column that no input ever reached gets a unit diagonal: it is rounded and compensates nothing.
    """
    diagonal = hessian.diagonal().clone()
    if order is None and act_order:
        order = diagonal.argsort(descending=True, stable=True)
    elif order is None:
        order = torch.arange(len(diagonal), device=hessian.device)
    damped = hessian[order][:, order]
    damped.diagonal().add_(_damping(diagonal, percdamp)[order])
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
