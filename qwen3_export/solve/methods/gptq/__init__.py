"""GPTQ (Frantar et al. 2022): round column after column, later columns compensate.

    min over codes of tr((W − Q) H (W − Q)ᵀ),   H = XᵀX / n + λI,   λ = percdamp · mean diag H

    U = upper Cholesky factor of H⁻¹
    for each column j:   q_j = round(w_j)         e = (w_j − q_j) / U_jj
                         W_:,k −= e · U_jk        for all k > j

With `scale_search: mse` or `absmax` scales are chosen before the solve, by the error weighted with diag H, and stay
fixed; with `solve` they are searched group by group during it. `act_order` visits columns by falling diag H; this
changes the solve but not the layout, so no `g_idx` is written. Steps beyond the paper are in `gptq.target_shift`,
`gptq.refine` and `gptq.noise_shaping`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import Workers
from qwen3_export.solve.chunk_sizes import WIDE
from qwen3_export.solve.method import FOLDS, LinearGroup, SolvedWeight, check_choice
from qwen3_export.solve.methods.gptq.block_types import block_columns, solve_block_type
from qwen3_export.solve.methods.gptq.cholesky import Factor, damped, factorise
from qwen3_export.solve.methods.gptq.columns import multiply, round_block
from qwen3_export.solve.methods.gptq.noise_shaping import fisher_factors, row_tasks, solve_shaped
from qwen3_export.solve.methods.gptq.refine import descend, group_order, refit_scales, search_columns
from qwen3_export.solve.methods.gptq.target_shift import start_shift_factors, target_shift_of, targets_in_turn
from qwen3_export.solve.rounding.grid import Grid, find_grid, shared_global_scale
from qwen3_export.solve.rounding.row_chunks import SolvedRows, check_finite, check_inputs, quadratic_form, solve_rows

SEARCHES = ("absmax", "mse", "solve")
_BLOCK = 128
# Coordinate descent has settled after a few passes.
_MOST_DESCENT = 100


@dataclass(frozen=True)
class Options:
    """Options of the recipe.

    `percdamp`: damping as a share of the mean Hessian diagonal. `act_order`: solve the columns with the largest inputs
    first. `scale_search`: `solve`, `mse` or `absmax`. `descent`: passes of coordinate descent after the solve, with
    scales refitted between them. `target_shift`: aim at the original model's outputs instead of this layer's; the
    original then runs beside the quantized model, on every `shift_every`th (1, 2 or 4) calibration sample. `fold`:
    `none`, `awq` or `smoothquant` before the solve (`blocks.fold`). `output_rows`: number of samples on which the
    Fisher information of outputs is measured, for noise shaping (`gptq.noise_shaping`); 0 turns it off.
    """

    percdamp: float = 0.01
    act_order: bool = True
    scale_search: str = "mse"
    descent: int = 0
    target_shift: bool = False
    shift_every: int = 1
    fold: str = "none"
    output_rows: int = 0

    def __post_init__(self) -> None:
        check_choice("scale_search", self.scale_search, SEARCHES)
        check_choice("fold", self.fold, FOLDS)
        check_choice("shift_every", self.shift_every, (1, 2, 4))
        if self.descent > _MOST_DESCENT:
            raise RecipeError(f"options: descent is {self.descent}, at most {_MOST_DESCENT} passes were expected")


def needs_inputs(_options: Options) -> bool:
    """Always true: the Hessian is made of inputs."""
    return True


def needs_original(options: Options) -> bool:
    """Whether the original runs beside: for the target shift only."""
    return options.target_shift


def fisher_samples(options: Options) -> int:
    """Samples on which the Fisher information of outputs is measured."""
    return options.output_rows


@dataclass(frozen=True)
class Problem:
    """A Hessian and a scheme that some linears of a group share.

    `factor` is the Cholesky factor in solving order. `damped` is H + λI in the columns' own order, needed to refit
    scales when there is more than one pass of descent.
    """

    scheme: QuantScheme
    hessian: Tensor
    factor: Factor
    damped: Tensor | None
    options: Options
    matmul_dtype: torch.dtype = torch.float32
    global_scale: float = 1.0


def solve(group: LinearGroup, options: Options, pool: Workers) -> dict[str, SolvedWeight]:
    """Solve all linears of the group against their common Hessian.

    The reported error of each is tr(ΔHΔᵀ) / tr(WHWᵀ). Raises RecipeError for inputs or weights that are not finite.
    """
    if group.hessian is None:
        raise ValueError("GPTQ was called without inputs")
    check_inputs(group)
    for name, weight in group.weights.items():
        check_finite(name, weight)
    paired = group.paired if options.target_shift else None
    if paired and len(group.hessian) > WIDE:
        targets = targets_in_turn(paired, group.weights, options.percdamp, pool)
        problems = {scheme: _problem(group, scheme, options, pool) for scheme in set(group.schemes.values())}
        return {
            name: _solve_linear(group, name, problems[group.schemes[name]], targets.pop(name, weight), pool)
            for name, weight in group.weights.items()
        }
    # Started first, so that the shift's factors are computed beside those of the problems.
    shift_factors = start_shift_factors(paired, options.percdamp, pool) if paired else []
    problems = {scheme: _problem(group, scheme, options, pool) for scheme in set(group.schemes.values())}
    shift = target_shift_of(paired, shift_factors, pool) if paired and shift_factors else None
    solved = {}
    for name, weight in group.weights.items():
        target = weight if shift is None else shift.target(weight, pool)
        solved[name] = _solve_linear(group, name, problems[group.schemes[name]], target, pool)
    return solved


def _problem(group: LinearGroup, scheme: QuantScheme, options: Options, pool: Workers) -> Problem:
    hessian, (first, *_) = group.hessian, group.weights
    assert hessian is not None
    order = None
    if scheme.block_type is not None:
        order = group_order(hessian, block_columns(scheme))
    elif options.scale_search == "solve" and scheme.strategy == "group":
        order = group_order(hessian, scheme.group_length(len(hessian)))
    factor = factorise(hessian, options.percdamp, options.act_order, first, order, pool)
    to_refit = damped(hessian, options.percdamp) if options.descent > 1 else None
    unit = shared_global_scale(list(group.weights.values()), scheme)
    return Problem(scheme, hessian, factor, to_refit, options, pool.matmul_dtype, unit)


def _solve_linear(group: LinearGroup, name: str, problem: Problem, target: Tensor, pool: Workers) -> SolvedWeight:
    """Solve one linear for `target`, in independent chunks of output rows."""
    weight = group.weights[name]
    measured = group.fisher.get(name, []) if problem.scheme.per_row else []
    uppers = [upper.to(weight.device) for upper in fisher_factors(measured)]
    solve_chunk = partial(_solve_chunk, target, problem, uppers)
    return solve_rows(name, weight, group, solve_chunk, pool, problem.global_scale, _chunks(weight, uppers))


def _chunks(weight: Tensor, uppers: list[Tensor]) -> list[slice] | None:
    """With noise shaping, chunks of rows made of whole pieces of G; else None."""
    begins = [*_begins(uppers), len(weight)]
    return [slice(begins[task.start], begins[task.stop]) for task in row_tasks(len(uppers))] if uppers else None


def _begins(uppers: list[Tensor]) -> list[int]:
    """The first row of each piece of G."""
    return [0, *accumulate(len(upper) for upper in uppers)][: len(uppers)]


def _solve_chunk(target: Tensor, problem: Problem, uppers: list[Tensor], out_rows: slice) -> SolvedRows:
    """Solve some output rows, with noise shaping where G is known."""
    own = [u for begin, u in zip(_begins(uppers), uppers, strict=True) if out_rows.start <= begin < out_rows.stop]
    part, solve_rows_of = target[out_rows], partial(_solve_rows, problem=problem)
    grid, codes = solve_shaped(part, own, solve_rows_of) if own else solve_rows_of(part)
    full = grid.columns(part.shape)
    delta = (codes - full.zeros) * full.scales - part
    error, total = (quadratic_form(matrix, problem.hessian, problem.matmul_dtype) for matrix in (delta, part))
    return SolvedRows(grid, codes, error, total)


def _solve_rows(weight: Tensor, problem: Problem) -> tuple[Grid, Tensor]:
    """Grid and codes of some output rows: GPTQ, then descent and refitted scales."""
    scheme, factor, unit, options = problem.scheme, problem.factor, problem.global_scale, problem.options
    if scheme.block_type is not None:
        return solve_block_type(weight, scheme, factor, options.descent, problem.damped, problem.matmul_dtype)
    if options.scale_search == "solve" and scheme.strategy == "group":
        codes, grid = search_columns(weight, scheme, factor.order, factor.upper, unit, problem.matmul_dtype)
    else:
        search = "mse" if options.scale_search == "solve" else options.scale_search
        grid = find_grid(weight, scheme, search, problem.hessian.diagonal(), unit)
        codes = round_columns(weight, grid.columns(weight.shape), factor, problem.matmul_dtype)
    for turn in range(options.descent):
        if turn > 0 and scheme.per_row:
            assert problem.damped is not None
            grid = refit_scales(weight, codes, grid, problem.damped, unit)
        codes = descend(weight, codes, grid, factor.damped, factor.order, problem.matmul_dtype)
    return grid, codes


def round_columns(weight: Tensor, grid: Grid, factor: Factor, matmul_dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes `[out, in]` in fp32 by GPTQ's recursion, block of columns after block.

    This is Algorithm 1 of Frantar et al. with scales that are given; `grid` has one entry per column. Everything is
    transposed, so that the innermost loops work on contiguous memory. `rest` is the part of W that is not quantized
    yet.
    """
    rest = weight.T[factor.order].contiguous()
    scales, zeros = grid.scales.T[factor.order], grid.zeros.T[factor.order]
    codes, upper = torch.empty_like(rest), factor.upper
    for begin in range(0, len(rest), _BLOCK):
        block = slice(begin, min(begin + _BLOCK, len(rest)))
        codes[block], errors = round_block(rest[block], scales[block], zeros[block], upper[block, block], grid.scheme)
        rest[block.stop :].sub_(multiply(upper[block, block.stop :].T, errors, matmul_dtype))
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.T.contiguous()
