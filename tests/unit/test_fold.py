"""Folds change no logits; AWQ's search and its clip search against brute force."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.block import NUM_STAGES
from qwen3_export.model.decoder import load_block, rope_tables
from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.fold import ROUTER, Site, apply, search, sites
from qwen3_export.solve.grid import find_grid, range_grid, round_to
from qwen3_export.solve.moments import Sample, collect
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
MODELS = {
    "one head per value head": tiny_config(num_attention_heads=4, num_key_value_heads=4),
    "grouped queries": tiny_config(num_attention_heads=4, num_key_value_heads=2),
    "one value head": tiny_config(num_attention_heads=4, num_key_value_heads=1),
    "moe": tiny_moe_config(),
}


@pytest.fixture(scope="module")
def pool() -> Workers:
    with workers(2) as found:
        yield found


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", request.param)


def scales_for(site: Site, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(int(site.index.max()) + 1, generator=random))
    return torch.exp2(torch.log2(scales).round()) if ROUTER in site.targets else scales


@torch.no_grad()
def test_a_fold_alone_changes_the_block_by_rounding_only(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    block, folded = load_block(checkpoint, 0), load_block(checkpoint, 0)
    x = torch.randn(2, 12, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(checkpoint.config, 0, 12)
    wanted = block.forward(x, rope)
    found_sites = sites(folded)
    for number, site in enumerate(found_sites):
        stored = apply(folded, site, scales_for(site, number), BF16)
        assert (stored is not None) == site.is_norm
        if stored is not None:
            # What is on the disk is what the columns were multiplied for.
            np.testing.assert_array_equal(stored.astype(np.float32), folded.weights[site.source].numpy())
    touched = {name for site in found_sites for name in site.targets}
    assert {name for name in block.weights if name.endswith("_proj")} <= touched
    torch.testing.assert_close(folded.forward(x, rope), wanted, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_the_routers_choices_are_the_same_bits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "moe", tiny_moe_config()))
    block = load_block(checkpoint, 0)
    site = next(site for site in sites(block) if ROUTER in site.targets)
    before = block.weights[ROUTER].clone()
    scales = scales_for(site, 1)
    apply(block, site, scales, BF16)
    np.testing.assert_array_equal(block.weights[ROUTER].numpy(), (before * scales).numpy())
    as_stored = block.weights[ROUTER].numpy().astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(as_stored, block.weights[ROUTER].numpy())


@torch.no_grad()
def test_awq_repairs_large_channels_and_leaves_even_ones_alone(tmp_path: Path, pool: Workers) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(hidden_size=64)))
    block = load_block(checkpoint, 0)
    site = sites(block)[0]
    generator = torch.Generator().manual_seed(5)
    for name in site.targets:
        block.weights[name] = torch.randn(block.weights[name].shape, generator=generator) * 0.05
    scheme = QuantScheme(num_bits=4, group_size=32)
    schemes = dict.fromkeys(site.targets, scheme)
    even = torch.randn(500, 64, generator=generator)
    large = even.clone()
    large[:, ::16] *= 60
    for name in site.targets:
        block.weights[name][:, ::16] /= 60

    def moments(x: torch.Tensor) -> object:
        return collect(lambda _: Sample(x), [0], 1, 64, "cpu", pool)

    scales = search("awq", site, block, moments(large), schemes, pool)
    assert scales is not None
    assert scales[::16].min() > 4 * scales[1::16].max()

    def error(spread: torch.Tensor) -> float:
        total = 0.0
        for name in site.targets:
            scaled = block.weights[name] * spread
            grid = find_grid(scaled, scheme, "absmax").columns(scaled.shape)
            delta = (round_to(scaled, grid.scales, grid.zeros, scheme) - grid.zeros) * grid.scales - scaled
            total += float((large @ (delta / spread).T).double().square().sum())
        return total

    assert error(scales) < 0.3 * error(torch.ones(64))


def test_the_hessian_search_takes_the_shrink_with_the_least_output_error() -> None:
    generator = torch.Generator().manual_seed(6)
    scheme = QuantScheme(num_bits=4, group_size=16)
    weight = torch.randn(8, 32, generator=generator)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    hessian = x.T @ x / 200
    blocks = torch.stack([hessian[:16, :16], hessian[16:, 16:]])
    grid = find_grid(weight, scheme, "hessian", blocks)
    for group in range(2):
        columns = slice(16 * group, 16 * group + 16)
        part = weight[:, None, columns]

        def error(scales: torch.Tensor, part: torch.Tensor = part, columns: slice = columns) -> torch.Tensor:
            codes = round_to(part[:, 0], scales, torch.full_like(scales, 8.0), scheme)
            delta = (codes - 8) * scales - part[:, 0]
            return (x[:, columns] @ delta.T).double().square().sum(0)

        tried = [error(range_grid(part, scheme, 1 - 0.025 * step)[0]) for step in range(-2, 22)]
        best = torch.stack(tried).min(0).values
        torch.testing.assert_close(error(grid.scales[:, group : group + 1]), best, rtol=1e-4, atol=0)


def test_every_site_runs_at_its_targets_stage(folder: Path) -> None:
    block = load_block(open_checkpoint(folder), 0)
    for site in sites(block):
        linears = block.stage_linears(site.stage)
        assert site.stage < NUM_STAGES
        assert all(name in linears for name in site.targets if name != ROUTER)
