"""GPTQ against a transcription of the paper's equations in fp64: no blocks, no Cholesky factor.

Frantar et al. 2022, equations 2 and 3: quantize column q, spread its error over the columns that are
left by the rows of their inverse Hessian, and take q out of that inverse by one elimination step.
A rounding decision may differ only where fp64 stands closer than 1e-4 to the middle of two codes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import dequantize
from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods import gptq, rtn
from qwen3_export.solve.rounding.grid import Grid, find_grid

TIE = 1e-4
by_order = pytest.mark.parametrize("act_order", [True, False])


class Problem(NamedTuple):
    weight: torch.Tensor
    hessian: torch.Tensor


def problem(out_features: int, in_features: int, seed: int = 0) -> Problem:
    """Inputs that are correlated and of unlike size, as those of a real linear."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((in_features, in_features)) / np.sqrt(in_features) + np.eye(in_features)
    x = random.standard_normal((4 * in_features, in_features)) @ mixing * np.exp(random.normal(0, 0.5, in_features))
    weight = random.standard_normal((out_features, in_features)) * 0.05
    return Problem(torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x / len(x)).float())


class Solution(NamedTuple):
    codes: np.ndarray
    distance: np.ndarray
    order: np.ndarray


def by_the_paper(weight: np.ndarray, hessian: np.ndarray, grid: Grid, percdamp: float, act_order: bool) -> Solution:
    """Codes, each one's distance from the nearest rounding border, and the solving order; all in fp64."""
    rest, diagonal = weight.astype(np.float64), hessian.diagonal()
    damped = hessian.astype(np.float64) + np.diag(np.where(diagonal == 0, 1.0, percdamp * diagonal.mean()))
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    inverse, left = np.linalg.inv(damped), list(order)
    scales, zeros = grid.scales.double().numpy(), grid.zeros.double().numpy()
    codes, distance = np.empty_like(rest), np.empty_like(rest)
    for q in order:
        exact = rest[:, q] / scales[:, q]
        codes[:, q] = np.clip(np.round(exact) + zeros[:, q], 0, grid.scheme.max_code)
        distance[:, q] = np.abs(exact - np.floor(exact) - 0.5)
        error = rest[:, q] - (codes[:, q] - zeros[:, q]) * scales[:, q]
        rest[:, left] -= np.outer(error / inverse[q, q], inverse[q, left])
        left.remove(q)
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return Solution(codes, distance, order)


def assert_same_but_for_ties(found: np.ndarray, wanted: Solution, allowed: int | None = None) -> None:
    """In each row, the first difference in solving order must be a tie; what follows it may differ."""
    different = (found != wanted.codes)[:, wanted.order]
    rows = np.flatnonzero(different.any(-1))
    first = wanted.order[different[rows].argmax(-1)]
    assert (wanted.distance[rows, first] < TIE).all()
    assert len(rows) <= (0.1 * len(found) if allowed is None else allowed)


def column_grid(weight: torch.Tensor, scheme: QuantScheme, hessian: torch.Tensor) -> Grid:
    return find_grid(weight, scheme, "mse", hessian.diagonal()).columns(weight.shape)


def solve(sample: Problem, scheme: QuantScheme, options: gptq.Options, pool: Workers) -> gptq.SolvedWeight:
    group = LinearGroup({"linear": sample.weight}, {"linear": scheme}, sample.hessian, 1000)
    return gptq.solve(group, options, pool)["linear"]


def weighted(delta: np.ndarray, hessian: torch.Tensor) -> float:
    return float(np.trace(delta @ hessian.double().numpy() @ delta.T))


@by_order
@pytest.mark.parametrize(
    ("in_features", "symmetric"),
    [(8, True), (32, False), (127, True), (128, True), (129, False), (160, False), (256, True), (300, True)],
)
def test_codes_are_those_of_the_papers_equations(in_features: int, act_order: bool, symmetric: bool) -> None:
    sample = problem(32, in_features)
    scheme = QuantScheme(symmetric=symmetric, strategy="channel")
    grid = column_grid(sample.weight, scheme, sample.hessian)
    found = gptq.round_columns(sample.weight, grid, gptq.factorise(sample.hessian, 0.01, act_order, "linear"))
    wanted = by_the_paper(sample.weight.numpy(), sample.hessian.numpy(), grid, 0.01, act_order)
    assert_same_but_for_ties(found.numpy(), wanted)
    plain = torch.clamp(torch.round(sample.weight / grid.scales) + grid.zeros, 0, 15)
    assert (plain != found).float().mean() > 0.05


@by_order
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 32), (8, 64)])
def test_groups_with_their_own_scales_are_solved_as_the_paper_says(
    bits: int, group: int, act_order: bool, pool: Workers
) -> None:
    sample = problem(24, 192, seed=bits)
    scheme = QuantScheme(num_bits=bits, group_size=group)
    tensor = solve(sample, scheme, gptq.Options(act_order=act_order), pool).tensor
    grid = column_grid(sample.weight, scheme, sample.hessian)
    np.testing.assert_array_equal(tensor.scales32.repeat(group, 1), grid.scales)
    wanted = by_the_paper(sample.weight.numpy(), sample.hessian.numpy(), grid, 0.01, act_order)
    assert_same_but_for_ties(tensor.codes, wanted)


@pytest.mark.parametrize("percdamp", [0.001, 0.01, 1.0])
@by_order
def test_the_factor_is_that_of_the_damped_inverse(percdamp: float, act_order: bool) -> None:
    hessian = problem(1, 96).hessian
    factor = gptq.factorise(hessian, percdamp, act_order, "linear")
    order, upper = factor.order.numpy(), factor.upper.double().numpy()
    damped = hessian.double().numpy() + percdamp * hessian.double().numpy().diagonal().mean() * np.eye(96)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped[np.ix_(order, order)], np.eye(96), atol=1e-3)
    wanted = np.argsort(-hessian.numpy().diagonal(), kind="stable") if act_order else np.arange(96)
    np.testing.assert_array_equal(order, wanted)


@by_order
def test_a_column_that_no_input_reaches_is_rounded_and_moves_nothing(act_order: bool) -> None:
    sample, dead = problem(16, 64), [0, 17, 63]
    alive = [i for i in range(64) if i not in dead]
    hessian = sample.hessian.clone()
    hessian[dead], hessian[:, dead] = 0, 0
    grid = column_grid(sample.weight, QuantScheme(strategy="channel"), hessian)
    found = gptq.round_columns(sample.weight, grid, gptq.factorise(hessian, 0.01, act_order, "linear"))
    nearest = torch.clamp(torch.round(sample.weight / grid.scales) + grid.zeros, 0, 15)
    np.testing.assert_array_equal(found[:, dead], nearest[:, dead])
    assert_same_but_for_ties(found.numpy(), by_the_paper(sample.weight.numpy(), hessian.numpy(), grid, 0.01, act_order))
    rest = Grid(grid.scheme, grid.scales[:, alive], grid.zeros[:, alive])
    # The damping is a share of the mean over all columns, the dead ones included.
    factor = gptq.factorise(hessian[alive][:, alive], 0.01 * len(alive) / 64, act_order, "linear")
    apart = gptq.round_columns(sample.weight[:, alive], rest, factor)
    assert (found[:, alive] != apart).float().mean() < 0.01


def test_inputs_that_are_all_zero_are_plain_rounding(pool: Workers) -> None:
    weight = problem(8, 64).weight
    scheme = QuantScheme(group_size=32)
    solved = solve(Problem(weight, torch.zeros(64, 64)), scheme, gptq.Options(scale_search="absmax"), pool)
    plain = rtn.solve(LinearGroup({"linear": weight}, {"linear": scheme}), rtn.Options("absmax"), pool)["linear"]
    np.testing.assert_array_equal(solved.tensor.codes, plain.tensor.codes)
    assert solved.error == 0


@by_order
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_are_plain_rounding(act_order: bool, search: str, symmetric: bool, pool: Workers) -> None:
    weight = problem(16, 160).weight
    scheme = QuantScheme(group_size=160, symmetric=symmetric)
    found = solve(Problem(weight, torch.eye(160)), scheme, gptq.Options(0.01, act_order, search), pool)
    plain = rtn.solve(LinearGroup({"linear": weight}, {"linear": scheme}), rtn.Options(search), pool)["linear"]
    np.testing.assert_array_equal(found.tensor.codes, plain.tensor.codes)
    np.testing.assert_array_equal(found.tensor.scales, plain.tensor.scales)
    assert found.error == pytest.approx(plain.error, rel=1e-5)


@by_order
def test_the_reported_error_is_the_weighted_one_of_what_is_shipped(act_order: bool, pool: Workers) -> None:
    sample = problem(1100, 64)
    solved = solve(sample, QuantScheme(group_size=32), gptq.Options(act_order=act_order), pool)
    weight = sample.weight.double().numpy()
    error = weighted(dequantize(solved.tensor) - weight, sample.hessian) / weighted(weight, sample.hessian)
    assert solved.error == pytest.approx(error, rel=1e-4)


@by_order
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_weighted_error_is_below_that_of_rounding(act_order: bool, bits: int, pool: Workers) -> None:
    ratios = []
    for seed in range(12):
        sample, scheme = problem(24, 128, seed), QuantScheme(num_bits=bits, group_size=32)
        solved = solve(sample, scheme, gptq.Options(act_order=act_order), pool)
        plain = rtn.solve(LinearGroup({"linear": sample.weight}, {"linear": scheme}), rtn.Options("mse"), pool)[
            "linear"
        ]
        weight = sample.weight.double().numpy()
        errors = [weighted(dequantize(s.tensor) - weight, sample.hessian) for s in (solved, plain)]
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.75


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_the_linears_name(value: float, pool: Workers) -> None:
    sample = problem(8, 32)
    sample.hessian[3, 5] = value
    with pytest.raises(RecipeError, match="linear: its inputs hold NaN or infinity"):
        solve(sample, QuantScheme(group_size=32), gptq.Options(), pool)


def test_a_weight_that_is_not_finite_is_refused_with_its_name(pool: Workers) -> None:
    sample = problem(8, 32)
    sample.weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match="linear: the weight holds NaN or infinity"):
        solve(sample, QuantScheme(group_size=32), gptq.Options(), pool)


def few_inputs(in_features: int = 64, count: int = 3) -> torch.Tensor:
    x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(0))
    return x.T @ x / count


@pytest.mark.parametrize("percdamp", [0.0, -1.0, float("nan")])
def test_a_hessian_that_cannot_be_factorised_is_refused_with_the_linears_name(percdamp: float) -> None:
    with pytest.raises(RecipeError, match="linear: the Hessian of its inputs is not positive definite") as caught:
        gptq.factorise(few_inputs(), percdamp, True, "linear")
    assert caught.value.hint is not None
    assert "percdamp" in caught.value.hint


def test_a_hessian_of_few_inputs_is_factorised_with_the_usual_damping() -> None:
    assert torch.isfinite(gptq.factorise(few_inputs(), 0.01, True, "linear").upper).all()


def test_a_hessian_too_hard_for_fp32_is_factorised_in_fp64() -> None:
    hessian, percdamp = few_inputs(512) * 100, 3e-6
    damped = hessian.clone()
    damped.diagonal().add_(percdamp * hessian.diagonal().mean())
    assert torch.linalg.cholesky_ex(damped).info > 0
    upper = gptq.factorise(hessian, percdamp, False, "linear").upper
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped.double())).T
    np.testing.assert_allclose(upper, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_linears_of_one_group_are_solved_as_they_are_alone(pool: Workers) -> None:
    first, second = problem(8, 64), problem(40, 64, seed=1)
    schemes = {"q": QuantScheme(group_size=32), "k": QuantScheme(num_bits=8, symmetric=False, group_size=16)}
    group = LinearGroup({"q": first.weight, "k": second.weight}, schemes, first.hessian, 10)
    together = gptq.solve(group, gptq.Options(), pool)
    for name, weight in group.weights.items():
        alone = gptq.solve(LinearGroup({name: weight}, schemes, first.hessian, 10), gptq.Options(), pool)[name]
        assert alone.tensor.codes.tobytes() == together[name].tensor.codes.tobytes()
        assert alone.error == together[name].error


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_code_and_no_error(threads: int, pool: Workers) -> None:
    sample = problem(1100, 160)
    wanted = solve(sample, QuantScheme(group_size=32), gptq.Options(), pool)
    with workers(threads) as other:
        found = solve(sample, QuantScheme(group_size=32), gptq.Options(), other)
    assert found.tensor.codes.tobytes() == wanted.tensor.codes.tobytes()
    assert found.error == wanted.error
