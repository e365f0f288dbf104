"""The search for ranges: against all of them, the compiled loops against torch, codes against the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SMALLEST_SCALE
from qwen3_export.model.table import to_numpy
from qwen3_export.solve.rounding.grid import Grid, _try_all, cut, find_grid, range_grid, round_onto, round_to
from qwen3_export.solve.rounding.scale_search import SHRINKS, numbers_to_try, round_groups

SCHEMES = [
    QuantScheme(4, group_size=128),
    QuantScheme(4, group_size=32, scale_dtype="fp16"),
    QuantScheme(3, group_size=64, scale_dtype="fp32"),
    QuantScheme(2, group_size=32),
    QuantScheme(8, group_size=128),
    QuantScheme(8, strategy="channel"),
    QuantScheme(4, strategy="channel", signed_scales=True),
    QuantScheme(4, group_size=64, signed_scales=True, scale_dtype="fp16"),
    QuantScheme(4, group_size=64, symmetric=False),
    QuantScheme(2, group_size=10, symmetric=False, scale_dtype="fp16"),
    QuantScheme(8, strategy="block", activations="dynamic-token"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.label}-{scheme.scale_dtype}")
# Errors are compared in fp32; how much more error than the best of all ranges half of them leave, all groups together.
BOUND, SKIPPED = 1e-6, 2e-3


def weights(kind: str, wide: int = 640) -> torch.Tensor:
    """bf16 weights `[70, wide]`: of one size, heavy-tailed, of sizes beyond what a scale can be, or of one sign."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(70, wide, generator=generator)
    if kind == "heavy":
        weight *= torch.exp(torch.randn(weight.shape, generator=generator))
    if kind == "all sizes":
        weight *= torch.exp(8 * torch.randn(70, 1, generator=generator))
        weight[7], weight[9, :128] = 0, 1e-30
    if kind == "one sign":
        weight = weight.abs() * torch.where(torch.arange(70) % 2 == 0, 1.0, -1.0)[:, None]
    return weight.bfloat16()


def errors(groups: torch.Tensor, scheme: QuantScheme, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Squared errors of rounding in fp32, in fp64; of one more axis of ranges in front."""
    codes = round_to(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), scheme)
    return ((codes - zeros.unsqueeze(-1)).double() * scales.unsqueeze(-1).double() - groups.double()) ** 2


def weighed(weighted: bool, scheme: QuantScheme) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Importance of the 640 columns, and of the weights of all groups."""
    if not weighted:
        return None, torch.ones(1)
    importance = torch.rand(640, generator=torch.Generator().manual_seed(4)) ** 6 * 100
    return importance, cut(importance.expand(scheme.rows_per_scale(70), -1), scheme)


@by_scheme
@pytest.mark.parametrize("kind", ["normal", "heavy", "all sizes", "one sign"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_range_is_nearly_the_best_of_all(scheme: QuantScheme, kind: str, weighted: bool) -> None:
    weight, (importance, spread) = weights(kind), weighed(weighted, scheme)
    groups = cut(weight.float(), scheme)
    costs = torch.stack([(errors(groups, scheme, *range_grid(groups, scheme, s)) * spread).sum(-1) for s in SHRINKS])
    for given in (weight, weight.float()):
        grid = find_grid(given, scheme, "mse", importance)
        cost = (errors(groups, scheme, grid.scales, grid.zeros) * spread).sum(-1)
        # Of those that all groups try, none is better; of all, hardly one.
        assert (cost <= costs[numbers_to_try(weighted)].amin(0) * (1 + BOUND) + 1e-30).all()
        assert cost.sum() <= costs.amin(0).sum() * (1 + (BOUND if weighted else SKIPPED))
        tried = torch.stack([range_grid(groups, scheme, shrink)[0] for shrink in SHRINKS])
        assert (grid.scales == tried).any(0).all()


@by_scheme
@pytest.mark.parametrize("kind", ["normal", "heavy", "all sizes", "one sign"])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_chooses_the_same_range_within_the_bound(scheme: QuantScheme, kind: str, weighted: bool) -> None:
    weight, (importance, spread) = weights(kind), weighed(weighted, scheme)
    groups = cut(weight.float(), scheme)
    grids = (
        find_grid(weight, scheme, "mse", importance),
        _try_all(groups, scheme, None if importance is None else spread),
    )
    mine, theirs = ((errors(groups, scheme, grid.scales, grid.zeros) * spread).sum(-1) for grid in grids)
    same = (grids[0].scales == grids[1].scales) & (grids[0].zeros == grids[1].zeros)
    near = (mine - theirs).abs() <= 4 * BOUND * theirs + 1e-30
    # Where two of the ranges that all groups try are equal, their neighbours are not.
    assert (same | near).double().mean() > 0.998
    assert same.double().mean() > 0.95 or kind == "all sizes"


@by_scheme
@pytest.mark.parametrize("kind", ["heavy", "all sizes", "one sign"])
def test_the_whole_range_is_that_of_torch(scheme: QuantScheme, kind: str) -> None:
    weight = weights(kind)
    scales, zeros = range_grid(cut(weight.float(), scheme), scheme, 1.0)
    found = find_grid(weight, scheme, "absmax")
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.zeros, zeros)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.per_row], ids=lambda s: f"{s.label}-{s.scale_dtype}")
@pytest.mark.parametrize("kind", ["heavy", "all sizes", "one sign"])
def test_codes_and_their_error_are_those_of_rounding_onto_the_grid(scheme: QuantScheme, kind: str) -> None:
    weight = weights(kind)
    *found, missed, whole = round_groups(to_numpy(weight), scheme.group_length(640), scheme, True)
    scales, zeros, codes = map(torch.from_numpy, found)
    grid = find_grid(weight, scheme, "mse")
    assert torch.equal(scales, grid.scales)
    assert torch.equal(zeros, grid.zeros)
    wanted, delta = round_onto(weight.float(), Grid(scheme, scales, zeros))
    assert torch.equal(codes.float(), wanted)
    assert missed == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
    assert whole == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


def test_of_equal_ranges_the_whole_one_is_kept() -> None:
    scheme, weight = QuantScheme(4, group_size=32), torch.zeros(2, 32)
    weight[1, :3] = torch.tensor([7.5, -7.5, 0.5]) * 2
    grid = find_grid(weight, scheme, "mse")
    assert grid.scales[0, 0] == SMALLEST_SCALE
    exact = torch.tensor([[3.0, -4.0, 1.0, 0.0] * 8]) * 0.25
    whole = QuantScheme(4, group_size=32, signed_scales=True)
    # Signed scales meet the largest exactly, so that more than one range has no error at all.
    assert torch.equal(find_grid(exact * 2, whole, "mse").scales, range_grid(cut(exact * 2, whole), whole, 1.0)[0])


def test_pieces_of_rows_do_not_change_the_result() -> None:
    weight, scheme = to_numpy(weights("heavy")), SCHEMES[0]
    whole = round_groups(weight, 128, scheme, True)
    parts = [round_groups(weight[i : i + 33], 128, scheme, True) for i in range(0, 70, 33)]
    for number in range(3):
        np.testing.assert_array_equal(np.concatenate([part[number] for part in parts]), whole[number])
