"""Errors shaped along the outputs: the measured G against autograd on the whole model, the solve against fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.block import Block, rms_norm
from qwen3_export.model.decoder import load_block, rope_tables, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration import fisher
from qwen3_export.solve.calibration.fisher import ROUTING_NOISE, measure_fisher, pieces_of
from qwen3_export.solve.calibration.measured_outputs import OF_EXPERTS
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.methods.gptq import noise_shaping
from qwen3_export.solve.quantize import quantize
from qwen3_export.solve.rounding.grid import Grid, find_grid, round_to
from qwen3_export.text.samples import Samples
from tests.conftest import copy_tokenizer, tiny_config, tiny_moe_config, write_checkpoint
from tests.reference.models import load_theirs, their_logits

SCHEME = QuantScheme(num_bits=3, group_size=16)
EMBEDDED = (-1, "looked-up rows")


def rows(count: int = 3, length: int = 20) -> Samples:
    random = np.random.default_rng(0)
    return Samples([random.integers(0, 320, length).astype(np.int32) for _ in range(count)], ["test"] * count)


def log_probabilities(folder: Path, text: Samples) -> list[np.ndarray]:
    """Transformers' own, fp64 `[tokens, vocabulary]` per row."""
    model = load_theirs(folder)
    logits = [torch.from_numpy(their_logits(model, ids).astype(np.float64)) for ids in text.ids]
    return [part.log_softmax(-1).numpy() for part in logits]


def plain_information(folder: Path, text: Samples, seed: int) -> dict[tuple[int, str], torch.Tensor]:
    """Mean g gᵀ of every linear's outputs by one backward pass over the whole model per row, in fp64."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    head = to_torch(checkpoint.read(checkpoint.head)).double()
    norm = to_torch(checkpoint.read("model.norm.weight")).double()
    totals: dict[tuple[int, str], torch.Tensor] = {}
    for number, ids in enumerate(text.ids):
        hidden = to_torch(checkpoint.read("model.embed_tokens.weight"))[torch.from_numpy(ids.astype(np.int64))]
        state = first = hidden.double()[None].requires_grad_()
        taps: dict[tuple[int, str], torch.Tensor] = {}
        for layer in range(config.num_layers):
            weights = {name: weight.double() for name, weight in load_block(checkpoint, layer).weights.items()}
            made: dict[str, torch.Tensor] = {}
            rope = tuple(table.double() for table in rope_tables(config, 0, len(ids)))
            hard = Block(config, layer, weights).forward(state.detach(), (rope[0], rope[1]))
            block = Block(config, layer, weights, outputs=made, routing_noise=ROUTING_NOISE)
            soft = block.forward(state, (rope[0], rope[1]))
            # The value of the original's choice of experts, the slope of the smoothed one.
            state = soft + (hard - soft).detach()
            taps |= {(layer, name): value for name, value in made.items() if name.endswith("_proj")}
            taps[layer, OF_EXPERTS] = state
        logits = rms_norm(state[0], norm, config.rms_norm_eps) @ head.T
        # The same labels as the streamed pass draws, from its fp32 probabilities.
        generator = torch.Generator().manual_seed((seed << 32) + number)
        labels = fisher.draw(logits.detach().float().softmax(-1), generator)
        loss = -logits.log_softmax(-1).gather(1, labels).sum()
        taps[EMBEDDED] = first
        slopes = torch.autograd.grad(loss, list(taps.values()), allow_unused=True)
        for key, slope in zip(taps, slopes, strict=True):
            flat = slope.reshape(-1, slope.shape[-1])
            totals[key] = totals.get(key, 0) + flat.T @ flat
    return totals


@pytest.mark.parametrize("config", [tiny_config(), tiny_moe_config()], ids=["dense", "moe"])
def test_the_streamed_pass_measures_what_a_whole_backward_pass_gives(
    tmp_path: Path, pool: Workers, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The vocabulary of 320 in several pieces, the last one shorter.
    monkeypatch.setattr(fisher, "_HEAD_ROWS", 150)
    monkeypatch.setattr(fisher, "_CONVERTED_ROWS", 100)
    folder, text = write_checkpoint(tmp_path / "model", config), rows()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    checkpoint = open_checkpoint(folder)
    with torch.no_grad():
        found = measure_fisher(checkpoint, text, 3, 7, pool, scratch, "cpu")
    wanted = plain_information(folder, text, 7)
    assert found.tokens() == 60
    of_rows = wanted[EMBEDDED] / 60
    assert float((found.of_rows() - of_rows).abs().max() / of_rows.abs().max()) < 1e-3
    shares = np.concatenate([np.exp(logits) for logits in log_probabilities(folder, text)])
    assert found.head_share() == pytest.approx(float((1 - (shares**2).sum(-1)).mean()), rel=1e-4)
    for layer in range(checkpoint.config.num_layers):
        shapes = checkpoint.config.linear_shapes(layer)
        sparse = {OF_EXPERTS: (checkpoint.config.hidden_size, 0)} if checkpoint.config.is_sparse(layer) else {}
        for name, (out, _) in {**shapes, **sparse}.items():
            pieces = found.of(layer, name, out)
            if ".experts." in name:
                assert pieces is None
                continue
            assert pieces is not None
            for piece, own in zip(pieces, pieces_of(out), strict=True):
                exact = wanted[layer, name][own, own]
                assert float((piece - exact).abs().max() / exact.abs().max()) < 1e-3
    assert not list(found.folder.glob("*.samples"))


@pytest.mark.parametrize("config", [tiny_config(), tiny_moe_config()], ids=["dense", "moe"])
def test_in_bf16_the_pass_measures_nearly_the_same(
    tmp_path: Path, pool: Workers, monkeypatch: pytest.MonkeyPatch, config: dict[str, object]
) -> None:
    """With the same labels: the numbers are rounded to 8 bits, which may move what is drawn."""
    folder, text = write_checkpoint(tmp_path / "model", config), rows()
    (tmp_path / "scratch").mkdir()
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(fisher, "draw", lambda shares, _: torch.arange(len(shares))[:, None] * 7 % shares.shape[1])
    monkeypatch.setattr(pool, "matmul_dtype", torch.bfloat16)
    with torch.no_grad():
        found = measure_fisher(checkpoint, text, 3, 7, pool, tmp_path / "scratch", "cpu")
    for (layer, name), exact in plain_information(folder, text, 7).items():
        if (layer, name) == EMBEDDED or (name == OF_EXPERTS and not checkpoint.config.is_sparse(layer)):
            continue
        pieces = found.of(layer, name, len(exact))
        if ".experts." in name:
            assert pieces is None
            continue
        assert pieces is not None
        for piece, own in zip(pieces, pieces_of(len(exact)), strict=True):
            # Where two experts are nearly equal, the slope of their smoothed weights is steep.
            bound = 0.2 if checkpoint.config.is_sparse(layer) else 0.05
            assert 1e-5 < float((piece - exact[own, own]).norm() / exact[own, own].norm()) < bound


def test_labels_are_drawn_by_their_shares() -> None:
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    labels = fisher.draw(shares.expand(20_000, -1), generator)
    assert labels.shape == (20_000, 1)
    found = torch.bincount(labels.flatten(), minlength=6) / 20_000
    assert not found[shares == 0].any()
    torch.testing.assert_close(found, shares, rtol=0, atol=0.015)
    again = fisher.draw(shares.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert torch.equal(labels, again)
    certain = torch.eye(6)[[4, 0, 5]]
    assert fisher.draw(certain, generator).flatten().tolist() == [4, 0, 5]


def test_pieces_cover_the_rows_evenly() -> None:
    for count in (1, 96, 512, 513, 768, 1000, 3072):
        pieces = pieces_of(count)
        assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(count))
        assert all(0 < piece.stop - piece.start <= 512 for piece in pieces)


def plain_round(weight: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    grid = find_grid(weight, SCHEME, "absmax")
    full = grid.columns(weight.shape)
    return grid, round_to(weight, full.scales, full.zeros, SCHEME)


def test_the_solve_is_the_transcribed_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one row in a batch: W_r −= W_b's error · U_br / U_bb, in fp64, for two pieces."""
    monkeypatch.setattr(noise_shaping, "BATCH", 1)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 32, generator=random)
    pieces = [_information(12, random), _information(8, random)]
    grid, codes = noise_shaping.solve_shaped(weight, noise_shaping.fisher_factors(pieces), plain_round)
    begin = 0
    for piece in pieces:
        rest = weight[begin : begin + len(piece)].double().clone()
        damped = piece.double() / piece.diagonal().mean() + noise_shaping.DAMPING * torch.eye(len(piece))
        for row in range(len(piece)):
            own_grid, own_codes = plain_round(rest[row : row + 1].float())
            assert torch.equal(own_codes[0], codes[begin + row])
            assert torch.equal(own_grid.scales[0], grid.scales[begin + row])
            full = own_grid.columns((1, 32))
            error = (rest[row] - ((own_codes - full.zeros) * full.scales)[0].double())[None]
            # The best that the rows to come can do about this error alone.
            if row + 1 < len(piece):
                after = damped[row + 1 :, row + 1 :]
                rest[row + 1 :] += torch.linalg.solve(after, damped[row + 1 :, row : row + 1]) @ error
        begin += len(piece)


def test_shaping_lowers_its_objective_where_outputs_depend_on_each_other() -> None:
    random = torch.Generator().manual_seed(1)
    weight, information = torch.randn(96, 64, generator=random), _information(96, random, rank=12)

    def cost(grid: Grid, codes: torch.Tensor) -> float:
        full = grid.columns(codes.shape)
        delta = ((codes - full.zeros) * full.scales - weight).double()
        return float(((information.double() @ delta) * delta).sum())

    assert cost(
        *noise_shaping.solve_shaped(weight, noise_shaping.fisher_factors([information]), plain_round)
    ) < 0.8 * cost(*plain_round(weight))


def test_rows_that_nothing_depends_on_are_left_to_the_plain_solve() -> None:
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    grid, codes = noise_shaping.solve_shaped(weight, noise_shaping.fisher_factors([torch.zeros(40, 40)]), plain_round)
    plain = plain_round(weight)
    assert torch.equal(codes, plain[1])
    assert torch.equal(grid.scales, plain[0].scales)


def test_a_run_has_the_same_bytes_for_one_and_two_threads(tmp_path: Path, reference_model: object) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(vocab_size=8192)))
    copy_tokenizer(reference_model.folder, source.folder)  # type: ignore[attr-defined]
    options = {"target_shift": True, "output_rows": 4, "scale_search": "solve", "descent": 1, "fold": "awq"}
    scheme = {"num_bits": 4, "group_size": 32}
    values = {"name": "t", "method": "gptq", "rules": [{"match": "*", "scheme": scheme}], "options": options}
    recipe = Recipe.from_dict(values, "test")
    for threads in (1, 2):
        settings = QuantizeSettings(samples=9, sequence_length=32, threads=threads)
        quantize(source, recipe, tmp_path / str(threads), settings)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def _information(size: int, random: torch.Generator, rank: int | None = None) -> torch.Tensor:
    slopes = torch.randn(rank or 3 * size, size, generator=random) @ torch.randn(size, size, generator=random)
    return slopes.T @ slopes
