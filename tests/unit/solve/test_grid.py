"""Scales, zero points and rounding to nearest, against plain loops in fp32 and fp64."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE, dequantize
from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup, SolvedWeight
from qwen3_export.solve.methods import rtn
from qwen3_export.solve.rounding.grid import Grid, find_grid

SCHEMES = [
    QuantScheme(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=16)
    for bits, symmetric, strategy in product((2, 4, 8), (True, False), ("group", "channel"))
]
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
by_search = pytest.mark.parametrize("search", ["absmax", "mse"])
STORAGE = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
SHRINKS = [1.0, *(1.0 - 0.025 * step for step in range(-2, 22))]


def heavy_tailed(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_t(4, shape) * 0.05
    return torch.from_numpy(values.astype(np.float32))


def rounded(scale: np.ndarray, dtype: str) -> np.ndarray:
    """To storage precision, inside fp16's normal range, back in fp64."""
    return np.clip(scale, 2.0**-14, 65280.0).astype(np.float32).astype(STORAGE[dtype]).astype(np.float64)


def range_grid(groups: np.ndarray, scheme: QuantScheme, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros that cover `shrink` times the range of each group `[out, groups, n]`."""
    if scheme.symmetric:
        scales = rounded(np.abs(groups).max(-1) * (shrink * 2 / scheme.max_code), scheme.scale_dtype)
        return scales, np.full_like(scales, 2 ** (scheme.num_bits - 1))
    low, high = np.minimum(groups.min(-1), 0) * shrink, np.maximum(groups.max(-1), 0) * shrink
    scales = rounded((high - low) / scheme.max_code, scheme.scale_dtype)
    return scales, np.clip(np.round(-low / scales), 0, scheme.max_code)


def squared_error(groups: np.ndarray, scales: np.ndarray, zeros: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    """Squared error of every weight, in fp64."""
    codes = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, scheme.max_code)
    return ((codes - zeros[..., None]) * scales[..., None] - groups) ** 2


def as_groups(weight: torch.Tensor, scheme: QuantScheme) -> np.ndarray:
    return weight.double().numpy().reshape(len(weight), scheme.num_groups(weight.shape[1]), -1)


def error_of(weight: torch.Tensor, grid: Grid) -> np.ndarray:
    return squared_error(as_groups(weight, grid.scheme), grid.scales.double().numpy(), grid.zeros.numpy(), grid.scheme)


def solve(weight: torch.Tensor, scheme: QuantScheme, search: str, pool: Workers) -> SolvedWeight:
    return rtn.solve(LinearGroup({"linear": weight}, {"linear": scheme}), rtn.Options(search), pool)["linear"]


@by_search
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_scales_are_exact_in_storage_and_in_range_whatever_the_weights(
    search: str, symmetric: bool, dtype: str
) -> None:
    scheme = QuantScheme(group_size=16, symmetric=symmetric, scale_dtype=dtype)
    magnitudes = torch.logspace(-30, 30, 61)[:, None]
    scales = find_grid(heavy_tailed((61, 64)) * magnitudes, scheme, search).scales
    stored = scales.numpy().astype(STORAGE[dtype])
    np.testing.assert_array_equal(stored.astype(np.float32), scales.numpy())
    assert scales.min() == SMALLEST_SCALE
    assert scales.max() == LARGEST_SCALE


def test_bf16_scales_are_exact_in_fp16_too() -> None:
    magnitudes = torch.logspace(-6, 6, 200)[:, None]
    scales = find_grid(heavy_tailed((200, 64)) * magnitudes, QuantScheme(group_size=16), "mse").scales
    assert len(torch.unique(scales)) > 300
    np.testing.assert_array_equal(scales.half().float(), scales)
    np.testing.assert_array_equal(scales.bfloat16().float(), scales)


@by_label
def test_absmax_covers_the_whole_range(scheme: QuantScheme) -> None:
    weight = heavy_tailed((20, 64))
    grid = find_grid(weight, scheme, "absmax")
    scales, zeros = range_grid(as_groups(weight, scheme), scheme, 1.0)
    np.testing.assert_array_equal(grid.scales.double(), scales)
    np.testing.assert_array_equal(grid.zeros.double(), zeros)


@by_label
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_finds_nearly_the_best_of_all_shrunken_ranges(scheme: QuantScheme, weighted: bool) -> None:
    weight, importance = heavy_tailed((40, 64)), torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4
    grid = find_grid(weight, scheme, "mse", importance if weighted else None)
    columns = as_groups(importance[None] if weighted else torch.ones(1, 64), scheme)
    groups = as_groups(weight, scheme)
    tried = [(squared_error(groups, *range_grid(groups, scheme, s), scheme) * columns).sum(-1) for s in SHRINKS]
    found = (error_of(weight, grid) * columns).sum(-1)
    np.testing.assert_allclose(found.sum(), np.min(tried, axis=0).sum(), rtol=1e-4 if weighted else 4e-3)
    # All groups try every second range, where errors are weighted every one.
    np.testing.assert_array_less(found, np.min(tried[1 :: 1 if weighted else 2], axis=0) * (1 + 1e-4) + 1e-30)
    assert (found <= tried[0] * (1 + 1e-6)).all()
    assert (found < tried[0] * 0.99).mean() > 0.25


@by_label
@by_search
def test_all_zero_groups_come_back_as_zero(scheme: QuantScheme, search: str, pool: Workers) -> None:
    weight = heavy_tailed((6, 64))
    weight[2:4], weight[0, :16] = 0, 0
    found = dequantize(solve(weight, scheme, search, pool).tensor)
    assert (found[2:4] == 0).all()
    assert (found[0, :16] == 0).all()
    assert np.isfinite(found).all()
    assert (found[4] != 0).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_asymmetric_range_always_holds_zero(sign: int, pool: Workers) -> None:
    scheme = QuantScheme(symmetric=False, group_size=16)
    weight = sign * (heavy_tailed((6, 64)).abs() + 0.5)
    grid = find_grid(weight, scheme, "absmax")
    assert (grid.zeros == (0 if sign > 0 else scheme.max_code)).all()
    assert (np.abs(dequantize(solve(weight, scheme, "absmax", pool).tensor) - weight.numpy()) < 0.1).all()


@by_label
@by_search
def test_rtn_codes_are_those_of_a_plain_loop(scheme: QuantScheme, search: str, pool: Workers) -> None:
    weight = heavy_tailed((7, 32), seed=5)
    tensor = solve(weight, scheme, search, pool).tensor
    for o, i in np.ndindex(7, 32):
        group = i // scheme.group_length(32)
        zero = 2 ** (scheme.num_bits - 1) if tensor.zeros is None else int(tensor.zeros[o, group])
        nearest = round(float(weight[o, i].numpy() / np.float32(tensor.scales[o, group])))
        assert tensor.codes[o, i] == min(max(nearest + zero, 0), scheme.max_code)


@by_label
def test_the_rtn_error_is_that_of_the_dequantized_weight(scheme: QuantScheme, pool: Workers) -> None:
    weight = heavy_tailed((1100, 32))
    solved = solve(weight, scheme, "mse", pool)
    wanted = weight.double().numpy()
    error = ((dequantize(solved.tensor) - wanted) ** 2).sum() / (wanted**2).sum()
    assert solved.error == pytest.approx(error, rel=1e-5)


def test_the_rtn_error_of_an_all_zero_weight_is_zero(pool: Workers) -> None:
    assert solve(torch.zeros(4, 32), QuantScheme(group_size=16), "mse", pool).error == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, pool: Workers) -> None:
    weight = heavy_tailed((4, 32))
    weight[3, 31] = value
    with pytest.raises(RecipeError, match="linear: the weight holds NaN or infinity"):
        solve(weight, QuantScheme(group_size=16), "mse", pool)


def test_an_unknown_search_is_refused(pool: Workers) -> None:
    with pytest.raises(RecipeError, match="scale_search is 'best'"):
        solve(heavy_tailed((4, 32)), QuantScheme(group_size=16), "best", pool)
