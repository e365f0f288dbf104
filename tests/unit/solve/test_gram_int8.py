"""Rows as bytes against a plain loop, and their products, which are exact sums of integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_export.solve.calibration import gram_avx2
from qwen3_export.solve.calibration.gram_int8 import Bytes, Panels, add_products, as_bytes
from tests.unit.processors import needs_avx2

KINDS = [torch.bfloat16, pytest.param(torch.float32, marks=needs_avx2)]
both_kinds = pytest.mark.parametrize("dtype", KINDS, ids=["bf16", "fp32"])
LARGEST = {torch.bfloat16: 127, torch.float32: 63}


def rows(*lengths: int, size: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(3 * torch.randn(size, generator=generator))
    means = [5 * torch.randn(size, generator=generator) for _ in lengths]
    return [
        ((mean + spread * torch.randn(length, size, generator=generator)) * scales).to(dtype)
        for length, mean in zip(lengths, means, strict=True)
    ]


def integers(found: Bytes) -> torch.Tensor:
    """The bytes `[tokens, n]`, those that fill up their number too."""
    if isinstance(found.values, torch.Tensor):
        return found.values
    values, size = found.values.values, found.centers.shape[1]
    matrix = values.transpose(0, 2, 4, 1, 3).reshape(values.shape[0] * 512, values.shape[1] * 16).astype(np.int64) - 64
    assert not matrix[:, size:].any()
    np.testing.assert_array_equal(found.values.totals, matrix.sum(0))
    return torch.from_numpy(matrix[:, :size])


def split(found: Bytes, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the bytes stand for, row by row, in fp64."""
    tokens, values = sum(map(len, parts)), integers(found)
    assert not values[tokens:].any()
    pieces = torch.split(values[:tokens].double() * found.scales.double(), [len(part) for part in parts])
    return [piece + center.double() for piece, center in zip(pieces, found.centers, strict=True)]


@both_kinds
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_bytes_are_half_a_step_from_what_they_stand_for(
    dtype: torch.dtype, lengths: list[int], size: int, seed: int, centered: bool
) -> None:
    parts = rows(*lengths, size=size, seed=seed, dtype=dtype)
    found = as_bytes(parts, centered)
    assert len(integers(found)) % 512 == 0
    assert not bool((integers(found).abs() > LARGEST[dtype]).any())
    assert centered or not found.centers.any()
    for part, stands, center, total in zip(parts, split(found, parts), found.centers, found.sums, strict=True):
        assert bool(((part.double() - stands).abs() <= found.scales * (0.5 + 1e-4)).all())
        wanted = ((stands - center.double()) if centered else part.double()).sum(0)
        torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-3 * float(found.scales.max()))


@both_kinds
def test_the_largest_distance_from_the_center_is_the_largest_byte(dtype: torch.dtype) -> None:
    parts = rows(64, 64, size=32, dtype=dtype)
    found = as_bytes(parts, True)
    distances = torch.cat([part.float() - center for part, center in zip(parts, found.centers, strict=True)]).abs()
    torch.testing.assert_close(found.scales * LARGEST[dtype], distances.amax(0))
    assert bool((integers(found)[:128].abs().amax(0) == LARGEST[dtype]).all())


@both_kinds
def test_a_first_token_a_thousand_times_as_large_does_not_move_the_center(dtype: torch.dtype) -> None:
    (part,) = rows(256, size=32, dtype=dtype)
    wanted = as_bytes([part], True).centers
    part[0] *= 1000
    assert torch.equal(as_bytes([part], True).centers, wanted)


@both_kinds
def test_columns_that_are_zero_or_the_same_everywhere_are_kept_exactly(dtype: torch.dtype) -> None:
    (part,) = rows(100, size=8, dtype=dtype)
    part[:, 2], part[:, 5] = 0.0, 3.25
    found = as_bytes([part], True)
    (stands,) = split(found, [part])
    assert not integers(found)[:, [2, 5]].any()
    assert torch.equal(stands[:, [2, 5]], part[:, [2, 5]].double())


@both_kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_the_scale_of_its_column_so(bad: float, dtype: torch.dtype) -> None:
    parts = rows(50, 60, size=16, dtype=dtype)
    parts[1][31, 3] = bad
    scales = as_bytes(parts, True).scales
    assert not torch.isfinite(scales[3])
    assert torch.isfinite(scales[[i for i in range(16) if i != 3]]).all()


@both_kinds
@pytest.mark.parametrize(("begin", "end"), [(0, 24), (8, 20), (23, 24)])
def test_products_are_exact_sums(begin: int, end: int, dtype: torch.dtype) -> None:
    """Of the integers, scaled in fp32 and added to what is there."""
    x = as_bytes(rows(200, 333, size=24, dtype=dtype), True)
    t = as_bytes(rows(200, 333, size=40, seed=1, dtype=dtype), False)
    total = torch.full((40, 24), 2.0)
    add_products(total, t, x, slice(0, 30), slice(begin, end))
    sums = integers(t).numpy().astype(np.int64).T @ integers(x).numpy().astype(np.int64)
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


@needs_avx2
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_of_the_longest_text_fit(sign: int) -> None:
    """All of them the largest, with the same sign or with opposite ones."""
    tokens = gram_avx2.MOST_TOKENS
    sides = [np.full((tokens // 512, 1, 128, 16, 4), 64 + side * 63, np.uint8) for side in (1, sign)]
    totals = np.full(16, sign * 63 * tokens, np.int32)
    left, right = (
        Bytes(Panels(side, totals), *(torch.ones(16), torch.zeros(1, 16), torch.zeros(1, 16))) for side in sides
    )
    total = torch.zeros(16, 16)
    add_products(total, left, right, slice(0, 16), slice(0, 16))
    assert bool((total == float(sign * 63**2 * tokens)).all())
