"""`recipes search`: sensitivities against whole models quantized in one unit only, budgets, determinism."""

from __future__ import annotations

import fnmatch
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.recipe import Recipe, Rule, load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError, RecipeError, ResourceError
from qwen3_export.model.decoder import Decoder
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.mixed_precision.candidates import OPTIONS_OF
from qwen3_export.solve.mixed_precision.knapsack import Choice, choose
from qwen3_export.solve.mixed_precision.result import SearchResult, to_yaml
from qwen3_export.solve.mixed_precision.search import SearchSettings, search
from qwen3_export.solve.mixed_precision.units import OUTER, Unit, units
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer, tiny_config, tiny_moe_config, write_checkpoint
from tests.unit.solve.outliers import with_outliers

SETTINGS = SearchSettings(4.6, samples=8, sequence_length=48, measure=3, fused=True, threads=1)
CONFIGS = {
    "dense": tiny_config(vocab_size=8192),
    "moe": tiny_moe_config(vocab_size=8192, num_experts=4, moe_intermediate_size=64, mlp_only_layers=[1]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / request.param, CONFIGS[request.param])
    copy_tokenizer(reference_folder, folder)
    return folder


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(open_checkpoint(source), SETTINGS, tmp_path_factory.mktemp("scratch"))


def divergence(original: Checkpoint, changed: Checkpoint, rows: list[np.ndarray]) -> float:
    """Mean KL over all positions, by whole forward passes."""

    def log_probabilities(checkpoint: Checkpoint) -> torch.Tensor:
        decoder = Decoder(checkpoint)
        return torch.cat([decoder.logits(hidden) for hidden in decoder.hidden(rows)]).double().log_softmax(-1)

    p, q = log_probabilities(original), log_probabilities(changed)
    return float((p.exp() * (p - q)).sum(-1).mean())


def measured_rows(source: Path, samples: int = SETTINGS.samples) -> list[np.ndarray]:
    documents = load_documents("bundled")
    rows = calibration_samples(ModelTokenizer(source), documents, samples + SETTINGS.measure, 48, 0)
    return list(rows.ids[samples:])


@pytest.mark.parametrize(("method", "fused"), [("gptq", True), ("gptq", False), ("rtn", True)])
def test_a_sensitivity_is_the_kl_of_a_model_quantized_in_one_unit(
    source: Path, tmp_path: Path, method: str, fused: bool, exact_products: None
) -> None:
    """Solved by `quantize`, loaded from its folder, run as a whole: none of the sweep's code."""
    original = open_checkpoint(source)
    found = search(original, replace(SETTINGS, method=method, fused=fused, fold="none"), tmp_path)
    for number in (1, 2) if fused else (2, 12):
        sensitivity, _ = found.units[number]
        base = load_recipe(OPTIONS_OF[method])
        rules = (Rule(sensitivity.unit.match, sensitivity.probe), Rule("*", None))
        settings = QuantizeSettings(samples=SETTINGS.samples, sequence_length=SETTINGS.sequence_length)
        quantize(original, replace(base, rules=rules), tmp_path / f"one-{number}", settings)
        expected = divergence(original, open_checkpoint(tmp_path / f"one-{number}"), measured_rows(source))
        # The Hessian's sums run in another order: a weight between two codes may fall to either side.
        assert sensitivity.kl == pytest.approx(expected, rel=0.02 if method == "gptq" else 1e-3)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_with_a_fold_it_is_the_kl_of_the_folded_model(
    source: Path, tmp_path: Path, method: str, exact_products: None
) -> None:
    """`quantize` folds a norm when all that read it are quantized: one fused unit. What the search moves besides,
    from rows of v and up to the columns of o and down, leaves the rounding of these rows as it is."""
    original = open_checkpoint(with_outliers(open_checkpoint(source), tmp_path / "outliers"))
    # A fold is searched on two of them: on one alone, folds between experts' linears are chance.
    grids = {"grids": ("symmetric",), "method": method, "samples": 16}
    plain = search(original, replace(SETTINGS, **grids, fold="none"), tmp_path)
    found = search(original, replace(SETTINGS, **grids, fold=None if method == "gptq" else "awq"), tmp_path)
    assert plain.recipe.options["fold"] == "none"
    assert found.recipe.options["fold"] == "awq"
    assert found.expected_kl < 0.9 * plain.expected_kl
    for number in (0, 2):
        sensitivity, before = found.units[number][0], plain.units[number][0]
        rules = (Rule(sensitivity.unit.match, sensitivity.probe), Rule("*", None))
        settings = QuantizeSettings(samples=16, sequence_length=SETTINGS.sequence_length)
        quantize(original, replace(found.recipe, rules=rules), tmp_path / f"one-{number}", settings)
        expected = divergence(original, open_checkpoint(tmp_path / f"one-{number}"), measured_rows(source, 16))
        assert sensitivity.kl == pytest.approx(expected, rel=0.02 if method == "gptq" else 5e-3)
        assert abs(sensitivity.kl - before.kl) > 0.1 * before.kl


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_so_is_that_of_embedding_and_head(source: Path, tmp_path: Path, method: str, exact_products: None) -> None:
    original = open_checkpoint(source)
    settings = replace(SETTINGS, method=method, embeddings=True, grids=("symmetric",))
    found = search(original, settings, tmp_path)
    outer = [(s, scheme) for s, scheme in found.units if s.unit.stage == OUTER]
    assert [s.unit.match for s, _ in outer] == list(original.config.outer_matrices())
    for sensitivity, scheme in outer:
        name = sensitivity.unit.match
        assert found.recipe.scheme_for(name) == scheme
        rules = (Rule(name, sensitivity.probe), Rule("*", None))
        run = QuantizeSettings(samples=SETTINGS.samples, sequence_length=SETTINGS.sequence_length)
        quantize(original, replace(load_recipe(OPTIONS_OF[method]), rules=rules), tmp_path / name, run)
        expected = divergence(original, open_checkpoint(tmp_path / name), measured_rows(source))
        assert sensitivity.kl == pytest.approx(expected, rel=0.02 if method == "gptq" else 1e-3)


def test_they_count_in_the_budget_when_asked(source: Path, tmp_path: Path) -> None:
    config = open_checkpoint(source).config
    found = search(open_checkpoint(source), replace(SETTINGS, method="rtn", embeddings=True), tmp_path)
    matrices = config.all_matrices()
    found.recipe.check_against(matrices)
    schemes = {name: found.recipe.scheme_for(name) for name in matrices}
    assert all(schemes.values())
    bits = sum(s.bits_per_weight(matrices[n]) * math.prod(matrices[n]) for n, s in schemes.items() if s)
    assert bits / sum(map(math.prod, matrices.values())) == pytest.approx(found.bits_per_weight)
    assert found.bits_per_weight <= SETTINGS.target_bpw
    assert "embedding and head" in found.recipe.description
    kept = search(open_checkpoint(source), replace(SETTINGS, method="rtn", embeddings=True, bits=(4, 16)), tmp_path)
    in_16_bits = [s.unit.match for s, scheme in kept.units if s.unit.stage == OUTER and scheme is None]
    assert not any(kept.recipe.scheme_for(name) for name in in_16_bits)


@pytest.mark.parametrize("fused", [True, False])
def test_every_linear_is_in_one_unit(source: Path, fused: bool) -> None:
    config = open_checkpoint(source).config
    found, names = units(config, fused), list[str]()
    for unit in found:
        names += [f"model.layers.{unit.layer}.{name}" for name in unit.shapes]
        rules = (Rule(unit.match, QuantScheme()), Rule("*", None))
        recipe = Recipe("one", "rtn", rules)
        matched = [name for name in config.all_linears() if recipe.scheme_for(name)]
        assert matched == [f"model.layers.{unit.layer}.{name}" for name in unit.shapes]
    assert sorted(names) == sorted(config.all_linears())
    kinds = {tuple(dict.fromkeys(name.rpartition(".")[2] for name in unit.shapes)) for unit in found}
    assert (("q_proj", "k_proj", "v_proj") in kinds) == (("gate_proj", "up_proj") in kinds) == fused
    assert len(found) == (4 if fused else 7) * config.num_layers


def test_the_budget_holds(found: SearchResult, source: Path) -> None:
    config, recipe = open_checkpoint(source).config, found.recipe
    linears = config.all_linears()
    recipe.check_against(linears)
    schemes = {name: recipe.scheme_for(name) for name in linears}
    bits = sum(s.bits_per_weight(linears[n]) * math.prod(linears[n]) if s else 0 for n, s in schemes.items())
    share = bits / sum(map(math.prod, linears.values()))
    assert share == pytest.approx(found.bits_per_weight)
    assert share <= SETTINGS.target_bpw
    for sensitivity, scheme in found.units:
        for name in sensitivity.unit.shapes:
            assert schemes[f"model.layers.{sensitivity.unit.layer}.{name}"] == scheme


def test_it_expects_less_loss_than_any_uniform_recipe(found: SearchResult) -> None:
    uniform = found.expected_uniform_kl()
    assert uniform is not None
    assert 0 < found.expected_kl < uniform


def test_more_room_never_loses_more(source: Path, tmp_path: Path) -> None:
    losses = [search(open_checkpoint(source), replace(SETTINGS, target_bpw=b), tmp_path) for b in (4.4, 5.5, 8.0)]
    for smaller, larger in pairwise(losses):
        # Both measured with their own probe; at equal schemes the losses differ by the error ratio.
        assert larger.expected_kl < smaller.expected_kl


def test_the_same_recipe_whatever_the_number_of_threads(found: SearchResult, source: Path, tmp_path: Path) -> None:
    again = search(open_checkpoint(source), replace(SETTINGS, threads=2), tmp_path)
    assert to_yaml(again.recipe) == to_yaml(found.recipe)
    assert [s.kl for s, _ in again.units] == [s.kl for s, _ in found.units]
    assert not list(tmp_path.iterdir())


def test_the_file_is_the_recipe(found: SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "found.yaml"
    path.write_text(to_yaml(found.recipe))
    assert load_recipe(str(path)) == found.recipe
    assert "block_shape" not in path.read_text()


def test_only_what_was_asked_for_is_mixed(source: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, target_bpw=6.0, bits=(3, 16), grids=("symmetric",), method="rtn")
    found = search(open_checkpoint(source), settings, tmp_path)
    chosen = {scheme for _, scheme in found.units}
    assert None in chosen
    assert {(s.num_bits, s.symmetric, s.signed_scales) for s in chosen if s} == {(3, True, False)}
    assert sum(s.loss(None) for s, _ in found.units) == 0


def test_by_kind_a_recipe_fits_models_of_any_depth(source: Path, tmp_path: Path) -> None:
    original = open_checkpoint(source)
    settings = replace(
        SETTINGS, target_bpw=5.5, method="rtn", embeddings=True, fused=False, groups=(64, 32), by_kind=True
    )
    found = search(original, settings, tmp_path)
    kinds: dict[str, set[QuantScheme | None]] = {}
    for sensitivity, scheme in found.units:
        kinds.setdefault(sensitivity.unit.pattern, set()).add(scheme)
    assert {len(schemes) for schemes in kinds.values()} == {1}
    assert len(set().union(*kinds.values())) > 1
    assert {s.group_size for schemes in kinds.values() for s in schemes if s and s.num_bits == 4} <= {64, 32}
    assert found.bits_per_weight <= 5.5
    deeper = replace(original.config, num_layers=5, tie_word_embeddings=False)
    found.recipe.check_against(deeper.all_matrices())
    for name in deeper.all_matrices():
        pattern = name.split(".", 3)[3] if ".layers." in name else "model.embed_tokens"
        wanted = [schemes for kind, schemes in kinds.items() if fnmatch.fnmatchcase(pattern, kind)]
        assert wanted == [{found.recipe.scheme_for(name)}], name


def test_the_recipe_for_devices_is_what_a_search_by_kind_finds(reference_model: Checkpoint, tmp_path: Path) -> None:
    """With 4 bits in groups of 32 and 8 in groups of 128, at its own size."""
    shipped, matrices = load_recipe("edge-w4-mixed"), reference_model.config.all_matrices()
    settings = replace(SETTINGS, target_bpw=5.63, fused=False, embeddings=True, grids=("signed",), groups=(32,))
    found = search(reference_model, replace(settings, by_kind=True), tmp_path)
    assert {name: found.recipe.scheme_for(name) for name in matrices} == {n: shipped.scheme_for(n) for n in matrices}
    # A mix made for this model, layer by layer, expects little less at this size.
    sizes = [[Choice(s.unit.bits(scheme), s.loss(scheme)) for scheme in s.errors] for s, _ in found.units]
    picks = choose(sizes, math.floor(5.63 * sum(s.unit.weights for s, _ in found.units)))
    assert picks is not None
    assert found.expected_kl < 1.2 * sum(unit[pick].loss for unit, pick in zip(sizes, picks, strict=True))


@pytest.mark.parametrize("target", [2.0, 9.0])
def test_a_budget_out_of_reach_is_refused_with_the_range(source: Path, tmp_path: Path, target: float) -> None:
    with pytest.raises(InputError, match=r"allow 4\.\d+ to 8\.\d+ bits per weight"):
        search(open_checkpoint(source), replace(SETTINGS, target_bpw=target), tmp_path)


@pytest.mark.parametrize("change", [{"bits": (5,)}, {"grids": ("odd",)}, {"method": "magic"}, {"sequence_length": 999}])
def test_bad_settings_are_refused(source: Path, tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        search(open_checkpoint(source), replace(SETTINGS, **change), tmp_path)  # type: ignore[arg-type]


def test_a_model_that_no_group_divides_is_refused(tmp_path: Path, reference_folder: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", tiny_config(hidden_size=40, vocab_size=8192))
    with pytest.raises(RecipeError, match=r"layers\.0.*40 inputs"):
        search(open_checkpoint(folder), SETTINGS, tmp_path)


def test_a_full_disk_is_foreseen(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ResourceError, match="are free"):
        search(open_checkpoint(source), SETTINGS, tmp_path)


def test_a_short_text_gives_a_part_to_measure_on(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The sea is wide and the boat is small. " * 60)
    settings = replace(SETTINGS, calibration=str(text), samples=100, method="rtn")
    assert search(open_checkpoint(source), settings, tmp_path).expected_kl > 0
    text.write_text("Too short. " * 20)
    with pytest.raises(InputError, match="at least 4"):
        search(open_checkpoint(source), settings, tmp_path)


def test_unit_sizes_count_scales_and_zero_points() -> None:
    unit = Unit(0, 1, "self_attn.o_proj", {"self_attn.o_proj": (8, 64)})
    assert unit.bits(QuantScheme(4, group_size=32)) == 8 * 64 * 4 + 8 * 2 * 16
    assert unit.bits(QuantScheme(4, symmetric=False, group_size=32)) == 8 * 64 * 4 + 8 * 2 * (16 + 4)
    assert unit.bits(None) == 8 * 64 * 16
