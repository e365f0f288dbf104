"""The solvers against the true optimum, found by trying every code, and against Babai's algorithm; all in fp64.

    minimise (q − w)ᵀ H (q − w) over q = (code − zero) · scale

is the closest vector problem in the lattice R·diag(scale), H = RᵀR. GPTQ is Babai's nearest plane
algorithm on it, columns in reverse (Chen et al. 2025), and so cannot be worse than half a step along
each direction of the factorisation, as long as no code is clamped.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import dequantize
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods import gptq
from qwen3_export.solve.methods.gptq.refine import descend
from qwen3_export.solve.rounding.grid import Grid, find_grid

ROWS, PERCDAMP = 48, 0.01


def problem(columns: int, seed: int, correlation: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[ROWS, columns]` and a Hessian of correlated inputs."""
    random = np.random.default_rng(seed)
    mixing = np.eye(columns) + correlation * random.standard_normal((columns, columns)) / np.sqrt(columns)
    x = random.standard_normal((8 * columns, columns)) @ mixing * np.exp(random.normal(0, 0.5, columns))
    weight = random.standard_normal((ROWS, columns)) * 0.05
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x / len(x)).float()


def damped(hessian: torch.Tensor) -> np.ndarray:
    """H + λI, as the paper's λ is."""
    exact = hessian.double().numpy()
    return exact + PERCDAMP * exact.diagonal().mean() * np.eye(len(exact))


def costs(delta: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(q − w)ᵀ H (q − w) along the last axis."""
    return np.einsum("...i,ij,...j->...", delta, hessian, delta)


def values(codes: torch.Tensor, grid: Grid) -> np.ndarray:
    full = grid.columns(codes.shape)
    return ((codes.double() - full.zeros) * full.scales.double()).numpy()


def best_costs(weight: torch.Tensor, grid: Grid, hessian: np.ndarray) -> np.ndarray:
    """The least cost of each row over all its codes on this grid."""
    full, levels = grid.columns(weight.shape), range(grid.scheme.max_code + 1)
    every = np.array(list(product(levels, repeat=weight.shape[1])), np.float64)
    found = []
    for row in range(len(weight)):
        q = (every - full.zeros[row].double().numpy()) * full.scales[row].double().numpy()
        found.append(costs(q - weight[row].double().numpy(), hessian).min())
    return np.array(found)


def babai(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray, upper: np.ndarray, largest: int) -> np.ndarray:
    """Nearest plane: the last column first, each code from what the columns after it leave over."""
    codes, q = np.zeros_like(weight), np.zeros_like(weight)
    for i in reversed(range(weight.shape[1])):
        left = (weight - q)[:, i + 1 :] @ upper[i, i + 1 :]
        exact = weight[:, i] + left / upper[i, i]
        codes[:, i] = np.clip(np.round(exact / scales[:, i]) + zeros[:, i], 0, largest)
        q[:, i] = (codes[:, i] - zeros[:, i]) * scales[:, i]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_babais_nearest_plane(symmetric: bool, act_order: bool) -> None:
    weight, hessian = problem(40, 1)
    scheme = QuantScheme(num_bits=4, group_size=8, symmetric=symmetric)
    grid = find_grid(weight, scheme, "mse", hessian.diagonal()).columns(weight.shape)
    factor = gptq.factorise(hessian, PERCDAMP, act_order, "linear")
    found = gptq.round_columns(weight, grid, factor).numpy()
    order = factor.order.numpy()[::-1]
    upper = np.linalg.cholesky(damped(hessian)[np.ix_(order, order)]).T
    exact = [m.double().numpy()[:, order] for m in (weight, grid.scales, grid.zeros)]
    wanted = np.empty_like(found)
    wanted[:, order] = babai(*exact, upper, scheme.max_code)
    # A tie in fp32 may fall to the other side, and changes what follows in its row.
    assert (found != wanted).any(1).mean() <= 0.05


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_keeps_babais_bound(act_order: bool) -> None:
    """(q − w)ᵀ H (q − w) ≤ ¼ Σ scale² / U_jj², U the factor of H⁻¹, where no code is clamped."""
    weight, hessian = problem(96, 2, correlation=4)
    grid = find_grid(weight * 4, QuantScheme(num_bits=8, strategy="channel"), "absmax").columns(weight.shape)
    factor = gptq.factorise(hessian, PERCDAMP, act_order, "linear")
    codes = gptq.round_columns(weight, grid, factor)
    assert codes.min() > 0
    assert codes.max() < 255
    found = costs(values(codes, grid) - weight.double().numpy(), damped(hessian))
    scales = grid.scales[:, factor.order].double().numpy()
    bound = (scales**2 / 4 / factor.upper.diagonal().double().numpy() ** 2).sum(1)
    assert (found <= bound * (1 + 1e-4)).all()
    nearest = torch.round(weight / grid.scales) * grid.scales
    assert costs((nearest - weight).double().numpy(), damped(hessian)).sum() > 1.5 * found.sum()


@pytest.mark.parametrize(("bits", "columns"), [(2, 6), (3, 4), (4, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_rung_is_below_the_optimum_and_descent_comes_near(bits: int, columns: int, symmetric: bool) -> None:
    ratios = []
    for seed in range(4):
        weight, hessian = problem(columns, 10 + seed)
        scheme = QuantScheme(num_bits=bits, strategy="channel", symmetric=symmetric)
        grid = find_grid(weight, scheme, "mse", hessian.diagonal())
        exact, target = damped(hessian), weight.double().numpy()
        best = best_costs(weight, grid, exact)
        factor = gptq.factorise(hessian, PERCDAMP, True, "linear")
        full = grid.columns(weight.shape)
        codes = gptq.round_columns(weight, full, factor)
        plain = costs(values(codes, grid) - target, exact)
        ordered = torch.from_numpy(exact).float()[factor.order][:, factor.order]
        for _ in range(3):
            codes = descend(weight, codes, grid, ordered, factor.order)
        lower = costs(values(codes, grid) - target, exact)
        nearest = torch.clamp(torch.round(weight / full.scales) + full.zeros, 0, scheme.max_code)
        rounded = costs(values(nearest, grid) - target, exact)
        assert (plain >= best * (1 - 1e-5)).all()
        assert (lower >= best * (1 - 1e-5)).all()
        assert (lower <= plain * (1 + 1e-5)).all()
        ratios.append([(c.sum() / best.sum()) for c in (rounded, plain, lower)])
    rounded, plain, lower = np.mean(ratios, 0)
    assert lower <= plain < rounded
    assert plain < 1.25
    assert lower < 1.15


def best_with_any_scale(weight: torch.Tensor, scheme: QuantScheme, hessian: np.ndarray) -> np.ndarray:
    """The least cost of each row over all codes and all positive scales, one group a row: each scale in closed form."""
    units = np.array(list(product(range(scheme.max_code + 1), repeat=weight.shape[1]))) - float(scheme.midpoint)
    units = units[units.any(1)]
    target = weight.double().numpy()
    gain = np.maximum(units @ hessian @ target.T, 0) ** 2 / costs(units, hessian)[:, None]
    return costs(target, hessian) - gain.max(0)


@pytest.mark.parametrize(("bits", "columns"), [(2, 6), (3, 4)])
def test_each_rung_brings_scales_and_codes_nearer_to_their_common_optimum(
    bits: int, columns: int, pool: Workers
) -> None:
    weight, hessian = problem(columns, 20)
    scheme, exact = QuantScheme(num_bits=bits, group_size=columns), damped(hessian)
    group = LinearGroup({"linear": weight}, {"linear": scheme}, hessian, 1000)
    least, totals = best_with_any_scale(weight, scheme, exact), []
    for options in (gptq.Options(), gptq.Options(scale_search="solve"), gptq.Options(0.01, True, "solve", 3)):
        tensor = gptq.solve(group, options, pool)["linear"].tensor
        found = costs(dequantize(tensor).astype(np.float64) - weight.double().numpy(), exact)
        assert (found >= least * (1 - 1e-6)).all()
        totals.append(found.sum() / least.sum())
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 1.4
