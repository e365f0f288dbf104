"""GPTQ (Frantar et al. 2022): round columns one by one, let the rest make up for each error.

    min over codes of tr((W − Q) H (W − Q)ᵀ),   H = XᵀX / n + λI,   λ = percdamp · mean diag H

    U = upper Cholesky factor of H⁻¹
    for each column j:   q_j = round(w_j)         e = (w_j − q_j) / U_jj
                         W_:,k −= e · U_jk        for all k > j

With `scale_search: mse` or `absmax` scales are chosen before the solve, by the diag(H)-weighted error, and
stay fixed; `solve` searches them group by group inside it. `act_order` visits columns by falling
diag H; the order changes the solve, never the layout, so no `g_idx` is written. The rungs beyond the
paper are in `gptq.target_shift` and `gptq.refine`.
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
from qwen3_export.solve.method import FOLDS, LinearGroup, SolvedWeight, check_choice
from qwen3_export.solve.methods.gptq.cholesky import Factor, damped, factorise
from qwen3_export.solve.methods.gptq.columns import multiply, round_block
from qwen3_export.solve.methods.gptq.noise_shaping import fisher_factors, row_tasks, solve_shaped
from qwen3_export.solve.methods.gptq.refine import descend, group_order, refit_scales, search_columns
from qwen3_export.solve.methods.gptq.target_shift import start_shift_factors, target_shift_of
from qwen3_export.solve.rounding.grid import Grid, find_grid, shared_global_scale
from qwen3_export.solve.rounding.row_chunks import SolvedRows, check_finite, check_inputs, quadratic_form, solve_rows

SEARCHES = ("absmax", "mse", "solve")
_BLOCK = 128
# Coordinate descent has settled after a few passes.
_MOST_DESCENT = 100


@dataclass(frozen=True)
class Options:
    """Options of the recipe.

    `percdamp`: damping as a share of the mean Hessian diagonal. `act_order`: solve the columns with
    the largest inputs first. `scale_search`: `solve`, `mse` or `absmax`. `descent`: passes of
    coordinate descent afterwards, scales refitted between them. `target_shift`: aim at the original
    model's outputs, not at this layer's; the original then runs beside the quantized model, on every `shift_every`th
    calibration row: 1, 2 or 4. `fold`:
    `none`, `awq` or `smoothquant` before the solve; see `blocks.fold`. `output_rows`: on so many rows a
    pass back through the original measures which outputs matter, and errors are shaped along them
    (`gptq.noise_shaping`); 0 leaves it out.
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
    """The Hessian is theirs."""
    return True


def needs_original(options: Options) -> bool:
    """The shift compares with the original model's activations."""
    return options.target_shift


def fisher_samples(options: Options) -> int:
    """Rows of the backward pass."""
    return options.output_rows


def solve(group: LinearGroup, options: Options, pool: Workers) -> dict[str, SolvedWeight]:
    """Solve all linears of the group against their common Hessian; error = tr(ΔHΔᵀ) / tr(WHWᵀ).

    Raises RecipeError for inputs or weights that are not finite.
    """
    hessian = group.hessian
    if hessian is None:
        raise ValueError("GPTQ was called without inputs")
    check_inputs(group)
    paired = group.paired if options.target_shift else None
    shift_factors = start_shift_factors(paired, options.percdamp, pool) if paired else []
    problems = {scheme: _problem(group, scheme, options, pool) for scheme in set(group.schemes.values())}
    shift = target_shift_of(paired, shift_factors, pool) if paired and shift_factors else None
    solved = {}
    for name, weight in group.weights.items():
        check_finite(name, weight)
        problem = problems[group.schemes[name]]
        target = weight if shift is None else shift.target(weight, pool)

        uppers = fisher_factors(group.fisher.get(name, []))
        cut = _cut(weight, group.schemes[name], uppers)

        def piece(
            rows: slice,
            target: Tensor = target,
            problem: Problem = problem,
            uppers: list[Tensor] = uppers,
        ) -> SolvedRows:
            own = [upper for begin, upper in _placed(uppers) if rows.start <= begin < rows.stop]
            solve_rows_of = partial(_solve_rows, problem=problem, options=options, matmul_dtype=pool.matmul_dtype)
            part = target[rows]
            grid, codes = solve_shaped(part, own, solve_rows_of, problem.scheme) if own else solve_rows_of(part)
            full = grid.columns(part.shape)
            delta = (codes - full.zeros) * full.scales - part
            return SolvedRows(
                grid,
                codes,
                quadratic_form(delta, hessian, pool.matmul_dtype),
                quadratic_form(part, hessian, pool.matmul_dtype),
            )

        solved[name] = solve_rows(name, weight, group, piece, pool, problem.global_scale, cut)
    return solved


def _placed(uppers: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Each factor with the first row of its piece."""
    begins = [0, *accumulate(len(upper) for upper in uppers)]
    return list(zip(begins, uppers, strict=False))


def _cut(weight: Tensor, scheme: QuantScheme, uppers: list[Tensor]) -> list[slice] | None:
    """Rows that are solved together where errors are shaped along them: whole pieces of G."""
    if not uppers or not scheme.per_row:
        uppers.clear()
        return None
    begins = [*(begin for begin, _ in _placed(uppers)), len(weight)]
    return [slice(begins[task.start], begins[task.stop]) for task in row_tasks(len(uppers))]


@dataclass(frozen=True)
class Problem:
    """One Hessian for one scheme: its factor in solving order, and to refit scales H + λI in the columns' own."""

    scheme: QuantScheme
    hessian: Tensor
    factor: Factor
    damped: Tensor | None
    global_scale: float = 1.0


def _problem(group: LinearGroup, scheme: QuantScheme, options: Options, pool: Workers) -> Problem:
    hessian, (first, *_) = group.hessian, group.weights
    assert hessian is not None
    order = None
    if options.scale_search == "solve" and scheme.strategy == "group":
        order = group_order(hessian, scheme.group_length(len(hessian)))
    factor = factorise(hessian, options.percdamp, options.act_order, first, order, pool)
    plain = damped(hessian, options.percdamp) if options.descent > 1 else None
    return Problem(scheme, hessian, factor, plain, shared_global_scale(list(group.weights.values()), scheme))


def _solve_rows(
    weight: Tensor, problem: Problem, options: Options, matmul_dtype: torch.dtype = torch.float32
) -> tuple[Grid, Tensor]:
    scheme, factor, unit = problem.scheme, problem.factor, problem.global_scale
    if options.scale_search == "solve" and scheme.strategy == "group":
        codes, grid = search_columns(weight, scheme, factor.order, factor.upper, unit, matmul_dtype)
    else:
        search = "mse" if options.scale_search == "solve" else options.scale_search
        grid = find_grid(weight, scheme, search, problem.hessian.diagonal(), unit)
        codes = round_columns(weight, grid.columns(weight.shape), factor, matmul_dtype)
    for turn in range(options.descent):
        if turn > 0 and scheme.per_row:
            assert problem.damped is not None
            grid = refit_scales(weight, codes, grid, problem.damped, unit)
        codes = descend(weight, codes, grid, factor.damped, factor.order, matmul_dtype)
    return grid, codes


def round_columns(weight: Tensor, grid: Grid, factor: Factor, matmul_dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes `[out, in]` in fp32; `grid` has one entry per column."""
    # Columns are rows here, so that the innermost work is on contiguous memory.
    rest = weight.T[factor.order].contiguous()
    scales, zeros = grid.scales.T[factor.order], grid.zeros.T[factor.order]
    codes = torch.empty_like(rest)
    count, upper = len(rest), factor.upper
    for begin in range(0, count, _BLOCK):
        own = slice(begin, min(begin + _BLOCK, count))
        codes[own], errors = round_block(rest[own], scales[own], zeros[own], upper[own, own], grid.scheme)
        rest[own.stop :].sub_(multiply(upper[own, own.stop :].T, errors, matmul_dtype))
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.T.contiguous()
