"""The rungs beyond plain GPTQ against float64 least squares, brute force, and plain GPTQ itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods.gptq import Factor, Options, factorise, round_columns, solve
from qwen3_export.solve.methods.gptq.refine import descend, group_order, refit_scales, search_columns
from qwen3_export.solve.rounding.grid import Grid, find_grid

SCHEME = QuantScheme(num_bits=4, group_size=32)
OUT, IN, TOKENS = 24, 96, 400


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Hessian of correlated inputs with a few large columns."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    x = torch.randn(TOKENS, IN, generator=generator) @ mixing
    x[:, ::17] *= 6
    weight = torch.randn(OUT, IN, generator=generator) * 0.05
    return weight, x.T @ x / TOKENS


def objective(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> float:
    full = grid.columns(weight.shape)
    delta = ((codes - full.zeros) * full.scales - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())


def start(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme = SCHEME
) -> tuple[torch.Tensor, Grid, Factor]:
    factor = factorise(hessian, 0.01, True, "test")
    grid = find_grid(weight, scheme, "mse", hessian.diagonal())
    return round_columns(weight, grid.columns((OUT, IN)), factor), grid, factor


def test_groups_stay_together_in_group_order(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    order = group_order(problem[1], 32)
    assert sorted(order.tolist()) == list(range(IN))
    assert all(len(set((order[i : i + 32] // 32).tolist())) == 1 for i in range(0, IN, 32))
    masses = [float(problem[1].diagonal()[order[i : i + 32]].sum()) for i in range(0, IN, 32)]
    assert masses == sorted(masses, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_inside_the_solve_is_plain_gptq_on_the_scales_it_chose(
    problem: tuple[torch.Tensor, torch.Tensor], symmetric: bool
) -> None:
    weight, hessian = problem
    scheme = QuantScheme(num_bits=4, group_size=32, symmetric=symmetric)
    order = group_order(hessian, 32)
    factor = factorise(hessian, 0.01, True, "test", order)
    codes, grid = search_columns(weight, scheme, order, factor.upper)
    again = round_columns(weight, grid.columns((OUT, IN)), factor)
    assert (codes == again).float().mean() > 0.999  # sums in another order may move a tie
    assert codes.min() >= 0
    assert codes.max() <= scheme.max_code


def test_the_search_inside_the_solve_beats_scales_chosen_before_in_the_same_order(
    problem: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weight, hessian = problem
    order = group_order(hessian, 32)
    factor = factorise(hessian, 0.01, True, "test", order)
    codes, grid = search_columns(weight, SCHEME, order, factor.upper)
    before = find_grid(weight, SCHEME, "mse", hessian.diagonal())
    plain = round_columns(weight, before.columns((OUT, IN)), factor)
    assert objective(weight, codes, grid, hessian) < objective(weight, plain, before, hessian)


def test_descent_ends_where_no_single_code_can_be_improved(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    codes, grid, factor = start(weight, hessian)
    error, ordered = objective(weight, codes, grid, hessian), hessian[factor.order][:, factor.order]
    for _ in range(12):
        codes = descend(weight, codes, grid, ordered, factor.order)
        now = objective(weight, codes, grid, hessian)
        assert now <= error * (1 + 1e-6)
        error = now
    for row, column in np.random.default_rng(0).integers(0, (OUT, IN), (40, 2)):
        for other in range(16):
            changed = codes.clone()
            changed[row, column] = other
            assert objective(weight, changed, grid, hessian) >= error * (1 - 1e-6)


def test_refitted_scales_are_the_least_squares_ones(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    scheme = QuantScheme(num_bits=4, group_size=32, scale_dtype="fp32")
    codes, grid, _ = start(weight, hessian, scheme)
    refitted = refit_scales(weight, codes, grid, hessian)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(OUT):
        units = (codes[row] - 8).double()
        columns = torch.zeros(IN, IN // 32, dtype=torch.double)
        for group in range(IN // 32):
            columns[group * 32 : (group + 1) * 32, group] = units[group * 32 : (group + 1) * 32]
        best = torch.linalg.lstsq(root @ columns, root @ weight[row].double()).solution
        torch.testing.assert_close(refitted.scales[row].double(), best, rtol=1e-4, atol=0)


def test_refitting_never_makes_a_row_worse(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    codes, grid, _ = start(weight, hessian)
    refitted = refit_scales(weight, codes, grid, hessian)
    assert torch.equal(refitted.scales, refitted.scales.bfloat16().float())
    for row in range(OUT):
        single = [Grid(SCHEME, g.scales[row : row + 1], g.zeros[row : row + 1]) for g in (refitted, grid)]
        errors = [objective(weight[row : row + 1], codes[row : row + 1], g, hessian) for g in single]
        assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("search", ["absmax", "mse", "solve"])
def test_each_pass_of_descent_lowers_the_error_of_the_layer(
    problem: tuple[torch.Tensor, torch.Tensor], pool: Workers, search: str
) -> None:
    weight, hessian = problem
    group = LinearGroup({"linear": weight}, {"linear": SCHEME}, hessian, TOKENS)
    options = [Options(scale_search=search, descent=passes) for passes in range(4)]
    errors = [solve(group, option, pool)["linear"].error for option in options]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]
