"""Rows as bytes against a plain loop, and their products, which are exact sums of integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_export.solve.bytes import Bytes, add_products, as_bytes


def rows(*lengths: int, size: int, seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(3 * torch.randn(size, generator=generator))
    means = [5 * torch.randn(size, generator=generator) for _ in lengths]
    return [
        ((mean + spread * torch.randn(length, size, generator=generator)) * scales).bfloat16()
        for length, mean in zip(lengths, means, strict=True)
    ]


def split(found: Bytes, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the bytes stand for, row by row, in fp64."""
    tokens = sum(map(len, parts))
    assert not found.values[tokens:].any()
    pieces = torch.split(found.values[:tokens].double() * found.scales.double(), [len(part) for part in parts])
    return [piece + center.double() for piece, center in zip(pieces, found.centers, strict=True)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_bytes_are_half_a_step_from_what_they_stand_for(
    lengths: list[int], size: int, seed: int, centered: bool
) -> None:
    parts = rows(*lengths, size=size, seed=seed)
    found = as_bytes(parts, centered)
    assert found.values.dtype == torch.int8
    assert len(found.values) % 512 == 0
    assert centered or not found.centers.any()
    for part, stands, center, total in zip(parts, split(found, parts), found.centers, found.sums, strict=True):
        assert bool(((part.double() - stands).abs() <= found.scales * (0.5 + 1e-4)).all())
        wanted = ((stands - center.double()) if centered else part.double()).sum(0)
        torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-3 * float(found.scales.max()))


def test_the_largest_distance_from_the_center_is_the_largest_byte() -> None:
    parts = rows(64, 64, size=32)
    found = as_bytes(parts, True)
    distances = torch.cat([part.float() - center for part, center in zip(parts, found.centers, strict=True)]).abs()
    torch.testing.assert_close(found.scales * 127, distances.amax(0))
    assert bool((found.values[:128].abs().amax(0) == 127).all())


def test_a_first_token_a_thousand_times_as_large_does_not_move_the_center() -> None:
    (part,) = rows(256, size=32)
    wanted = as_bytes([part], True).centers
    part[0] *= 1000
    assert torch.equal(as_bytes([part], True).centers, wanted)


def test_columns_that_are_zero_or_the_same_everywhere_are_kept_exactly() -> None:
    (part,) = rows(100, size=8)
    part[:, 2], part[:, 5] = 0.0, 3.25
    found = as_bytes([part], True)
    (stands,) = split(found, [part])
    assert not found.values[:, [2, 5]].any()
    assert torch.equal(stands[:, [2, 5]], part[:, [2, 5]].double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_the_scale_of_its_column_so(bad: float) -> None:
    parts = rows(50, 60, size=16)
    parts[1][31, 3] = bad
    scales = as_bytes(parts, True).scales
    assert not torch.isfinite(scales[3])
    assert torch.isfinite(scales[[i for i in range(16) if i != 3]]).all()


@pytest.mark.parametrize(("begin", "end"), [(0, 24), (8, 20), (23, 24)])
def test_products_are_exact_sums(begin: int, end: int) -> None:
    """Of the integers, scaled in fp32 and added to what is there."""
    x, t = as_bytes(rows(200, 333, size=24), True), as_bytes(rows(200, 333, size=40, seed=1), False)
    total = torch.full((40, 24), 2.0)
    add_products(total, t, x, slice(0, 30), slice(begin, end))
    sums = t.values.numpy().astype(np.int64).T @ x.values.numpy().astype(np.int64)
    scaled = sums * t.scales.numpy()[:, None].astype(np.float64) * x.scales.numpy().astype(np.float64)
    np.testing.assert_allclose(total[:30, begin:end].numpy(), 2.0 + scaled[:30, begin:end], rtol=1e-5, atol=1e-3)
    total[:30, begin:end] = 2.0
    assert bool((total == 2.0).all())


def test_no_number_of_tokens_is_too_many() -> None:
    """An integer of 32 bits holds the products of 133,000 of them."""
    values = torch.full((1 << 18, 3), 127, dtype=torch.int8)
    x = Bytes(values, torch.ones(3), torch.zeros(1, 3), torch.zeros(1, 3))
    total = torch.zeros(3, 3)
    add_products(total, x, x, slice(0, 3), slice(0, 3))
    assert bool((total == float(127**2 << 18)).all())
