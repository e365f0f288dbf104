"""Compiled passes over bf16 and fp32 rows against the operations that they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.model.block import Block, rms_norm, rotate
from qwen3_export.model.passes import add_rows, normed, normed_and_turned
from tests.conftest import tiny_config

EPS = 1e-6


def tables(tokens: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(tokens).float(), 10_000 ** -(torch.arange(wide // 2) / (wide // 2)))
    return angles.cos(), angles.sin()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def norm_weight(wide: int) -> torch.Tensor:
    return torch.rand(wide, generator=torch.Generator().manual_seed(wide)) + 0.5


@pytest.mark.parametrize("wide", [2, 16, 64, 128])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (1, 37, 4), (3, 5, 2)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_heads_are_normed_and_turned_as_in_fp32(batch: int, tokens: int, heads: int, wide: int, size: float) -> None:
    x, weight = random(batch, tokens, heads, wide) * size, norm_weight(wide)
    cos, sin = tables(tokens, wide)
    found = normed_and_turned(x, weight, EPS, cos, sin)
    wanted = rotate(rms_norm(x.transpose(1, 2).float(), weight, EPS), cos, sin)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    exact = normed_and_turned(x.float(), weight, EPS, cos, sin)
    # Two products of opposite sign may nearly cancel: what is left has their rounding.
    left = 1e-6 * float(wanted.abs().max())
    torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=left)
    # Rounded once; a square's place in a sum can move a number across the middle between two others.
    assert ((found.float() - wanted).abs() <= 2.0**-8 * wanted.abs() + left).all()
    assert (found == wanted.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("wide", [1, 7, 64, 1024])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rows_are_normed_as_by_torch(wide: int, size: float) -> None:
    x, weight = random(2, 37, wide).float() * size, norm_weight(wide)
    for given in (x, x.transpose(0, 1)):
        torch.testing.assert_close(normed(given, weight, EPS), rms_norm(given, weight, EPS), rtol=1e-5, atol=0)


def test_heads_need_not_lie_in_one_piece() -> None:
    x, weight = random(2, 8, 12, 32), torch.ones(32)
    part = x[:, :, 3:7]
    assert not part.is_contiguous()
    turned = normed_and_turned(part, weight, EPS, *tables(8, 32))
    assert torch.equal(turned, normed_and_turned(part.contiguous(), weight, EPS, *tables(8, 32)))


def test_a_block_that_is_asked_for_gradients_gives_the_same_numbers_and_has_them() -> None:
    config = parse_config(tiny_config(), "test")
    shapes = {**config.linear_shapes(0), **config.other_shapes(0)}
    generator = torch.Generator().manual_seed(1)
    weights = {
        name.removesuffix(".weight"): torch.rand(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }
    block = Block(config, 0, weights).running(torch.bfloat16)
    hidden, rope = random(1, 40, config.hidden_size).float(), tables(40, config.head_dim)
    alone = block.forward(hidden, rope)
    asked = hidden.clone().requires_grad_()
    with torch.enable_grad():
        beside = block.forward(asked, rope)
        (slope,) = torch.autograd.grad(beside.sum(), asked)
    assert (alone - beside).abs().max() < 2.0**-6 * beside.abs().max()
    assert torch.isfinite(slope).all()
    assert not torch.equal(slope, torch.ones_like(slope)), "more than the residual stream"


@pytest.mark.parametrize("wide", [1, 7, 64, 3072])
def test_rows_are_added_up(wide: int) -> None:
    x, sums = random(53, wide) * 3, torch.full((wide,), 0.5)
    add_rows(x, sums)
    torch.testing.assert_close(sums, 0.5 + x.double().sum(0), rtol=1e-5, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    x, sums = random(9, 16), torch.zeros(16)
    x[4, 3] = bad
    add_rows(x, sums)
    assert not torch.isfinite(sums[3])
    assert torch.isfinite(sums[4:]).all()
