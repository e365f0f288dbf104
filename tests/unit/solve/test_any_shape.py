"""Property tests of the solvers: whatever the shape, the groups and the bits, what they promise holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup, SolvedWeight
from qwen3_export.solve.methods import gptq, rtn
from qwen3_export.solve.rounding.grid import Grid, find_grid
from tests.unit.solve.test_gptq import Problem, assert_same_but_for_ties, by_the_paper, problem, weighted

OPTIONS = st.fixed_dictionaries(
    {
        "percdamp": st.sampled_from([0.001, 0.01, 0.1]),
        "act_order": st.booleans(),
        "scale_search": st.sampled_from(gptq.SEARCHES),
        "descent": st.integers(0, 2),
    }
)


@st.composite
def integer_schemes(draw: st.DrawFn) -> QuantScheme:
    symmetric = draw(st.booleans())
    return QuantScheme(
        num_bits=draw(st.sampled_from([2, 3, 4, 8])),
        symmetric=symmetric,
        strategy=draw(st.sampled_from(["group", "channel"])),
        group_size=draw(st.sampled_from([1, 3, 8, 16, 32, 64])),
        scale_dtype=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        signed_scales=symmetric and draw(st.booleans()),
    )


@st.composite
def schemes(draw: st.DrawFn) -> QuantScheme:
    """Integers and floats of every grain."""
    if draw(st.booleans()):
        return draw(integer_schemes())
    if draw(st.booleans()):
        scale, group = draw(st.sampled_from([("e8m0", 32), ("e4m3", 16)]))
        return QuantScheme(type="float", scale_dtype=scale, group_size=group)
    strategy = draw(st.sampled_from(["tensor", "channel", "block"]))
    block = (draw(st.integers(1, 9)), draw(st.integers(1, 40))) if strategy == "block" else None
    return QuantScheme(num_bits=8, type="float", strategy=strategy, block_shape=block)


@st.composite
def samples(draw: st.DrawFn, of: st.SearchStrategy[QuantScheme], largest: int = 160) -> tuple[QuantScheme, Problem]:
    """A scheme, and a weight and a Hessian whose columns its groups divide."""
    scheme = draw(of)
    step = scheme.group_size or 1
    count = draw(st.integers(1, max(1, largest // step)))
    sample = problem(draw(st.integers(1, 20)), count * step, seed=draw(st.integers(0, 99)))
    return scheme, Problem(sample.weight * 2.0 ** draw(st.integers(-6, 6)), sample.hessian)


def check_stored(tensor: QuantizedTensor) -> None:
    """Codes and zero points that have their bits, finite weights."""
    assert tensor.codes.max() <= tensor.scheme.max_code
    assert tensor.zeros is None or tensor.zeros.max() <= tensor.scheme.max_code
    assert np.isfinite(dequantize(tensor)).all()
    assert tensor.scheme.signed_scales or (tensor.scales32 > 0).all()


def full(tensor: QuantizedTensor) -> Grid:
    """The stored grid with one entry per weight."""
    zero = tensor.scheme.midpoint if tensor.scheme.type == "int" else 0
    zeros = np.full(tensor.scales.shape, zero) if tensor.zeros is None else tensor.zeros
    grid = Grid(tensor.scheme, torch.from_numpy(tensor.scales32), torch.from_numpy(zeros.astype(np.float32)))
    return grid.columns(tensor.shape)


@given(samples(schemes()), st.sampled_from(["absmax", "mse", "hessian"]))
def test_rtn_stores_the_nearest_number_of_the_grid_that_it_stores(
    pool: Workers, sample: tuple[QuantScheme, Problem], search: str
) -> None:
    scheme, (weight, hessian) = sample
    group = LinearGroup({"linear": weight}, {"linear": scheme}, hessian if search == "hessian" else None, 1000)
    tensor = rtn.solve(group, rtn.Options(search), pool)["linear"].tensor
    check_stored(tensor)
    grid, stored = full(tensor), torch.from_numpy(dequantize(tensor)).double()
    found = (stored - weight).abs()
    for step in (-1, 1):
        # The next code up or down is no nearer.
        codes = tensor.codes.astype(np.int16) + step
        if scheme.type == "int":
            other = (torch.from_numpy(codes).double() - grid.zeros) * grid.scales.double()
            inside = torch.from_numpy((codes >= 0) & (codes <= scheme.max_code))
            assert (found <= (other - weight).abs() * (1 + 1e-5) + 1e-12)[inside].all()
    if scheme.type == "int" and scheme.symmetric and search == "absmax" and not scheme.signed_scales:
        # bf16 rounds a scale by 2⁻⁸ of itself at most, and the largest weight loses half a step.
        assert (found <= grid.scales * (0.5 + scheme.max_code * 2.0**-8)).all()


@settings(max_examples=40)
@given(samples(integer_schemes(), 200), st.booleans(), st.sampled_from([0.001, 0.01, 1.0]))
def test_gptq_solves_the_papers_equations(
    pool: Workers, sample: tuple[QuantScheme, Problem], act_order: bool, percdamp: float
) -> None:
    scheme, (weight, hessian) = sample
    options = gptq.Options(percdamp, act_order, "mse")
    tensor = solve(weight, hessian, scheme, options, pool).tensor
    check_stored(tensor)
    grid = find_grid(weight, scheme, "mse", hessian.diagonal()).columns(weight.shape)
    np.testing.assert_array_equal(full(tensor).scales, grid.scales)
    np.testing.assert_array_equal(full(tensor).zeros, grid.zeros)
    wanted = by_the_paper(weight.numpy(), hessian.numpy(), grid, percdamp, act_order)
    assert_same_but_for_ties(tensor.codes, wanted, allowed=max(2, len(weight) // 5))


@settings(max_examples=40)
@given(samples(integer_schemes()), OPTIONS)
def test_every_rung_ships_what_it_reports(
    pool: Workers, sample: tuple[QuantScheme, Problem], chosen: dict[str, Any]
) -> None:
    scheme, (weight, hessian) = sample
    solved = solve(weight, hessian, scheme, gptq.Options(**chosen), pool)
    check_stored(solved.tensor)
    exact = weight.double().numpy()
    error = weighted(dequantize(solved.tensor) - exact, hessian) / weighted(exact, hessian)
    assert solved.error == pytest.approx(error, rel=1e-2, abs=1e-9)
    if chosen["descent"]:
        # What descent lowers is the damped error, of which λ‖Δ‖² is a part.
        before = solve(weight, hessian, scheme, gptq.Options(**{**chosen, "descent": 0}), pool)
        damped = hessian + chosen["percdamp"] * hessian.diagonal().mean() * torch.eye(len(hessian))
        after, start = (weighted(dequantize(s.tensor) - exact, damped) for s in (solved, before))
        assert after <= start * (1 + 1e-4)


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, options: gptq.Options, pool: Workers
) -> SolvedWeight:
    return gptq.solve(LinearGroup({"linear": weight}, {"linear": scheme}, hessian, 1000), options, pool)["linear"]
