"""Folds change no logits, of a block and of whole models in transformers; SmoothQuant's scales."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.architecture import ROUTER
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.activations import rounder
from qwen3_export.model.decoder import load_block, rope_tables
from qwen3_export.model.workers import Workers
from qwen3_export.solve.blocks.fold import FoldSite, apply_fold, fold_sites, search_scales
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.moments import SampleInputs
from qwen3_export.solve.rounding.grid import find_grid, round_to
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint
from tests.reference.models import TOLERANCE, load_theirs, random_rows, relative_error, their_logits

BF16 = np.dtype(ml_dtypes.bfloat16)
MODELS = {
    "one head per value head": tiny_config(num_attention_heads=4, num_key_value_heads=4),
    "grouped queries": tiny_config(num_attention_heads=4, num_key_value_heads=2),
    "one value head": tiny_config(num_attention_heads=4, num_key_value_heads=1),
    "moe": tiny_moe_config(),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", request.param)


def scales_for(site: FoldSite, seed: int) -> torch.Tensor:
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
    found_sites = fold_sites(folded)
    for number, site in enumerate(found_sites):
        stored = apply_fold(folded, site, scales_for(site, number), BF16)
        assert (stored is not None) == site.is_norm
        if stored is not None:
            # What is on the disk is what the columns were multiplied for.
            np.testing.assert_array_equal(stored.astype(np.float32), folded.weights[site.source].numpy())
    touched = {name for site in found_sites for name in site.targets}
    assert {name for name in block.weights if name.endswith("_proj")} <= touched
    torch.testing.assert_close(folded.forward(x, rope), wanted, rtol=2e-5, atol=2e-5)


def folded_copy(checkpoint: Checkpoint, folder: Path) -> Path:
    """The whole model with random scales moved at every site of every block, as a plain fp32 folder."""
    tensors = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.files}
    for layer in range(checkpoint.config.num_layers):
        block = load_block(checkpoint, layer)
        for number, site in enumerate(fold_sites(block)):
            apply_fold(block, site, scales_for(site, 100 * layer + number), BF16)
        tensors |= {f"{block_name(layer)}.{name}.weight": weight.numpy() for name, weight in block.weights.items()}
    return write_checkpoint(folder, dict(checkpoint.raw_config), tensors)


def test_folds_alone_leave_transformers_logits_of_the_whole_model_unchanged_to_rounding(
    folder: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(folder)
    before, after = load_theirs(folder), load_theirs(folded_copy(checkpoint, tmp_path / "folded"))
    changed = 0.0
    for ids in random_rows(checkpoint.config.vocab_size):
        wanted = their_logits(before, ids)
        assert relative_error(their_logits(after, ids), wanted) <= TOLERANCE
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if name.endswith(("layernorm.weight", "proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            changed = relative_error(new.detach().numpy(), old.detach().numpy())
            assert changed > 0.1, name
        elif name.endswith(("q_norm.weight", "k_norm.weight", "embed_tokens.weight")):
            assert torch.equal(old, new), name
    assert changed


@torch.no_grad()
def test_smoothquant_moves_half_of_the_range_from_activations_to_weights(tmp_path: Path, pool: Workers) -> None:
    """Xiao et al. 2023, equation 4 with α = ½: s = max|x|^½ / max|w|^½, centred; only norms are divided."""
    block = load_block(open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config())), 0)
    generator = torch.Generator().manual_seed(7)
    scheme = QuantScheme(num_bits=8, strategy="channel", activations="dynamic-token")
    for site in fold_sites(block):
        x = torch.randn(300, len(site.index), generator=generator)
        x[:, 3] *= 50
        moments = collect_moments(lambda _, x=x: SampleInputs(x), [0], 1, len(site.index), "cpu", pool)
        schemes = dict.fromkeys([*site.targets, site.source], scheme)
        scales = search_scales("smoothquant", site, block, moments, schemes, pool)
        if not site.is_norm:
            assert scales is None
            continue
        assert scales is not None
        largest = torch.stack([block.weights[name].abs().amax(0) for name in site.targets]).amax(0)
        wanted = (x.abs().amax(0) / largest).sqrt()
        torch.testing.assert_close(scales / scales[0], wanted / wanted[0], rtol=1e-4, atol=0)

        def error(spread: torch.Tensor, x: torch.Tensor = x, site: FoldSite = site) -> float:
            total = 0.0
            for name in site.targets:
                scaled = block.weights[name] * spread
                grid = find_grid(scaled, scheme, "absmax").columns(scaled.shape)
                rounded = (round_to(scaled, grid.scales, grid.zeros, scheme) - grid.zeros) * grid.scales
                found = rounder(scheme, None)(x / spread) @ rounded.T
                total += float((found - x @ block.weights[name].T).double().square().sum())
            return total

        assert error(scales) < 0.3 * error(torch.ones_like(scales))


@torch.no_grad()
def test_the_routers_choices_are_the_same_bits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "moe", tiny_moe_config()))
    block = load_block(checkpoint, 0)
    site = next(site for site in fold_sites(block) if ROUTER in site.targets)
    before = block.weights[ROUTER].clone()
    scales = scales_for(site, 1)
    apply_fold(block, site, scales, BF16)
    np.testing.assert_array_equal(block.weights[ROUTER].numpy(), (before * scales).numpy())
    as_stored = block.weights[ROUTER].numpy().astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(as_stored, block.weights[ROUTER].numpy())


def test_every_site_runs_at_its_targets_stage(folder: Path) -> None:
    block = load_block(open_checkpoint(folder), 0)
    for site in fold_sites(block):
        linears = block.stages[site.stage].names
        assert site.stage < len(block.stages)
        assert all(name in linears for name in site.targets if name != ROUTER)
