"""AWQ's search of scales and its clip search against brute force, and what is shipped after a fold."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.decoder import load_block
from qwen3_export.model.workers import Workers
from qwen3_export.solve.blocks.fold import fold_sites, search_scales
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.moments import SampleInputs
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.preflight import activation_bytes
from qwen3_export.solve.quantize import quantize
from qwen3_export.solve.rounding.grid import find_grid, range_grid, round_to
from qwen3_export.text.samples import Samples
from tests.artifact.support import VOCABULARY
from tests.cli.helpers import write_text_model
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint
from tests.reference.models import our_logits, random_rows
from tests.unit.solve.outliers import with_outliers

BF16 = np.dtype(ml_dtypes.bfloat16)


@torch.no_grad()
def test_awq_repairs_large_channels_and_leaves_even_ones_alone(tmp_path: Path, pool: Workers) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(hidden_size=64)))
    block = load_block(checkpoint, 0)
    site = fold_sites(block)[0]
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
        return collect_moments(lambda _: SampleInputs(x), [0], 1, 64, "cpu", pool)

    scales = search_scales("awq", site, block, moments(large), schemes, pool)
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


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
@pytest.mark.parametrize("config", [tiny_config(), tiny_moe_config()], ids=["dense", "moe"])
def test_what_is_shipped_after_a_fold_is_the_same_model_and_better(
    tmp_path: Path, config: dict[str, object], method: str
) -> None:
    plain = open_checkpoint(write_checkpoint(tmp_path / "plain", {**config, "vocab_size": VOCABULARY}))
    source = with_outliers(plain, tmp_path / "outliers")
    rows = random_rows(VOCABULARY, [40])
    wanted = our_logits(source, rows)[0]
    np.testing.assert_allclose(wanted, our_logits(plain.folder, rows)[0], rtol=0, atol=1e-4)
    errors = {}
    for fold in ("none", "awq"):
        scheme = {"num_bits": 4, "group_size": 32 if config["model_type"] == "qwen3" else 16}
        values = {"name": fold, "method": method, "rules": [{"match": "*", "scheme": scheme}]}
        recipe = Recipe.from_dict({**values, "options": {"fold": fold}, "experts": {"min_tokens": 0}}, "test")
        quantize(open_checkpoint(source), recipe, tmp_path / fold, QuantizeSettings(samples=12, sequence_length=64))
        errors[fold] = float(((our_logits(tmp_path / fold, rows)[0] - wanted) ** 2).mean())
    norm = "model.layers.0.input_layernorm.weight"
    before, after = (open_checkpoint(path).read(norm).astype(np.float32) for path in (source, tmp_path / "awq"))
    # The outliers are gone from the norm that is shipped.
    assert (before[::9] / after[::9]).mean() > 4 * (before / after)[1::9].mean()
    assert errors["awq"] < 0.8 * errors["none"]


def test_the_room_for_a_fold_is_counted_where_a_recipe_leaves_it_to_the_method(tmp_path: Path) -> None:
    source, rules = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config())), [{"match": "*", "scheme": {}}]
    text = Samples([np.zeros(64, np.int32)] * 64, ["test"] * 64)
    rooms = [
        activation_bytes(
            source, Recipe.from_dict({"name": "r", "method": "awq", "rules": rules, "options": options}, "r"), text
        )
        for options in ({}, {"fold": "awq"}, {"fold": "none"})
    ]
    assert rooms[0] == rooms[1] > rooms[2]


def awq_candidates(x: torch.Tensor, weights: list[torch.Tensor], columns: torch.Tensor, group: int) -> list[np.ndarray]:
    """The paper's s = mean|x|^α, alone and over mean|w|^(1 − α), w relative to its group's largest; in fp64.

    No channel counts as smaller than the median one.
    """
    rows = int(columns.max()) + 1

    def collapsed(values: np.ndarray) -> np.ndarray:
        return np.array([values[columns.numpy() == row].mean() for row in range(rows)])

    shares = []
    for weight in weights:
        cells = weight.double().abs().numpy().reshape(len(weight), -1, group)
        shares.append((cells / cells.max(-1, keepdims=True)).reshape(weight.shape).mean(0))
    size, share = collapsed(x.double().abs().mean(0).numpy()), collapsed(np.mean(shares, 0))
    size = np.maximum(size, np.sort(size)[(rows - 1) // 2])
    found = [np.ones(rows)]
    for step in range(1, 11):
        found += [size ** (step / 10), size ** (step / 10) / (share ** (1 - step / 10) + 1e-4)]
    return [scales / np.sqrt(scales.max() * scales.min()) for scales in found]


@torch.no_grad()
@pytest.mark.parametrize(("rows_tried", "within"), [(768, 1e-2), (16, 1e-1)], ids=["all rows", "some rows"])
@pytest.mark.parametrize("number", [0, 1, 2, 3], ids=["q, k, v", "o", "gate, up", "down"])
def test_awq_takes_the_scales_with_the_least_output_error(
    tmp_path: Path, pool: Workers, number: int, rows_tried: int, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every candidate of the grid, its error measured on the outputs themselves, of all rows."""
    monkeypatch.setattr("qwen3_export.solve.blocks.fold.ROWS_TRIED", rows_tried)
    config = tiny_config(intermediate_size=64)
    block = load_block(open_checkpoint(write_checkpoint(tmp_path / "model", config)), 0)
    site, group = fold_sites(block)[number], 16
    scheme, generator = QuantScheme(num_bits=4, group_size=group), torch.Generator().manual_seed(number)
    x = torch.randn(400, len(site.index), generator=generator)
    x *= torch.exp(1.5 * torch.randn(len(site.index), generator=generator))
    weights = [block.weights[name] for name in site.targets]
    schemes = dict.fromkeys([*site.targets, site.source], scheme)
    scales = search_scales(
        "awq",
        site,
        block,
        collect_moments(lambda _: SampleInputs(x), [0], 1, len(site.index), "cpu", pool),
        schemes,
        pool,
    )
    assert scales is not None
    # Rows of one channel each, which lift those that the text hardly uses to the median one's energy.
    quadratic_form = x.square().sum(0)
    seen = torch.cat([x, torch.diag((quadratic_form.median() - quadratic_form).clamp(min=0).sqrt())])

    def error(tried: np.ndarray) -> float:
        spread = torch.from_numpy(tried).float()[site.index]
        total = 0.0
        for weight in weights:
            scaled = weight * spread
            grid = find_grid(scaled, scheme, "absmax").columns(scaled.shape)
            rounded = (round_to(scaled, grid.scales, grid.zeros, scheme) - grid.zeros) * grid.scales
            total += float(((seen / spread) @ rounded.T - seen @ weight.T).double().square().sum())
        return total

    errors = [error(candidate) for candidate in awq_candidates(x, weights, site.index, group)]
    assert error(scales.numpy()) == pytest.approx(min(errors), rel=within)
    assert min(errors) < 0.9 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize("loud", [1, 20], ids=["even", "with outliers"])
def test_channels_that_calibration_text_hardly_uses_are_no_worse_for_other_text(
    tmp_path: Path, pool: Workers, loud: float
) -> None:
    """A third of down_proj's inputs sleep on one kind of text, and wake on another."""
    block = load_block(open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(intermediate_size=96))), 0)
    site, scheme, generator = (
        fold_sites(block)[3],
        QuantScheme(num_bits=4, group_size=32),
        torch.Generator().manual_seed(11),
    )
    x = torch.randn(400, 96, generator=generator)
    x[:, 1::3] *= 0.05
    x[:, ::24] *= loud
    weight = block.weights[site.targets[0]] = torch.randn(block.weights[site.targets[0]].shape, generator=generator)
    weight[:, ::24] /= loud
    schemes = dict.fromkeys([*site.targets, site.source], scheme)
    scales = search_scales(
        "awq", site, block, collect_moments(lambda _: SampleInputs(x), [0], 1, 96, "cpu", pool), schemes, pool
    )
    if loud == 1:
        assert scales is None
        return
    assert scales is not None

    def error(spread: torch.Tensor, channels: slice) -> float:
        scaled = weight * spread
        grid = find_grid(scaled, scheme, "absmax").columns(scaled.shape)
        delta = ((round_to(scaled, grid.scales, grid.zeros, scheme) - grid.zeros) * grid.scales - scaled) / spread
        return float(delta[:, channels].double().square().sum())

    plain = torch.ones(96)
    assert error(scales, slice(0, None, 24)) < 0.3 * error(plain, slice(0, None, 24))
    sleeping, awake = slice(1, None, 3), slice(2, None, 3)
    # Outliers take room of the grid from all others alike, and no more from those that slept.
    assert error(scales, sleeping) / error(plain, sleeping) < 1.2 * error(scales, awake) / error(plain, awake)


def test_bytes_are_those_of_no_fold_where_none_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_text_model(tmp_path / "model")
    monkeypatch.setattr("qwen3_export.solve.blocks.fold._LEAST_GAIN", 1.0)
    found = []
    for fold in ("none", "awq"):
        values = {"name": "x", "method": "gptq", "rules": [{"match": "*", "scheme": {"num_bits": 4, "group_size": 32}}]}
        recipe = Recipe.from_dict({**values, "options": {"fold": fold}}, "test")
        quantize(open_checkpoint(source), recipe, tmp_path / fold, QuantizeSettings(samples=8, sequence_length=32))
        found.append([path.read_bytes() for path in sorted((tmp_path / fold).glob("*.safetensors"))])
    assert found[0] == found[1]
