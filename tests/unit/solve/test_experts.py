"""Experts that few tokens reach: what they are solved against, what is said about them, and what it costs.

The source has one expert that no token ever reaches: with one expert per token, a router row that is
the mean of the others is never the largest.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name, parse_config
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.solve.blocks import fold, forward
from qwen3_export.solve.calibration import experts as experts_module
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples, calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer, random_tensors, tiny_moe_config, write_checkpoint
from tests.unit.solve.support import Interrupted, hashes, inputs_of_linears, spied

SAMPLES, LENGTH, EXPERTS, NEVER = 11, 48, 4, 2
# 528 tokens on three experts: at least one of them gets fewer.
FLOOR = 170
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {}),
    "gptq shifted": ("gptq", {"target_shift": True}),
    "gptq folded": ("gptq", {"fold": "awq"}),
    "awq": ("awq", {}),
    "rtn weighted": ("rtn", {"scale_search": "hessian"}),
}
Counts = dict[str, list[int]]


def recipe(method: str = "gptq", fallback: str = "share", token_floor: int | None = FLOOR, **more: Any) -> Recipe:
    scheme = {"num_bits": 4, "group_size": 16, **more.pop("scheme", {})}
    rules = more.pop("rules", [{"match": "*", "scheme": scheme}])
    rule = {"min_tokens": token_floor, "fallback": fallback}
    values = {"name": "test", "method": method, "rules": rules, "options": more, "experts": rule}
    return Recipe.from_dict(values, "test")


def make_source(folder: Path, reference_folder: Path, **changes: Any) -> Path:
    sizes = {"vocab_size": 8192, "num_experts": EXPERTS, "num_experts_per_tok": 1, **changes}
    config = tiny_moe_config(**sizes)
    tensors = random_tensors(parse_config(config, "test"))
    for layer in range(config["num_hidden_layers"]):
        router = tensors[f"{block_name(layer)}.mlp.gate.weight"]
        others = [row for row in range(len(router)) if row != NEVER]
        router[NEVER] = router[others].astype(np.float32).mean(0).astype(router.dtype)
    write_checkpoint(folder, config, tensors)
    copy_tokenizer(reference_folder, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    folder = make_source(tmp_path_factory.mktemp("experts") / "moe", reference_folder)
    words = " ".join(f"{i} times {i} is {i * i}, and the {i}th row ends." for i in range(400))
    (folder.parent / "calibration.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def settings(source: Path) -> QuantizeSettings:
    return QuantizeSettings(str(source.parent / "calibration.txt"), SAMPLES, LENGTH, threads=2)


@pytest.fixture(scope="module")
def run(
    source: Path, settings: QuantizeSettings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Checkpoint, dict[str, Any]]]:
    """`run(recipe, setting=…)` → the quantized folder, opened, and its manifest."""

    def quantized(chosen: Recipe, progress: Progress | None = None, **changes: Any) -> tuple[Checkpoint, Any]:
        output = tmp_path_factory.mktemp("out") / "out"
        quantize(open_checkpoint(source), chosen, output, replace(settings, **changes), progress)
        return open_checkpoint(output), read_manifest(output)

    return quantized


def samples_of(source: Path, settings: QuantizeSettings) -> Samples:
    documents = load_documents(settings.calibration)
    return calibration_samples(ModelTokenizer(source), documents, SAMPLES, LENGTH, settings.seed)


def starved(counts: Counts, token_floor: int = FLOOR) -> set[str]:
    """Prefixes of the experts below the floor."""
    return {
        f"{layer}.mlp.experts.{expert}."
        for layer, found in counts.items()
        for expert, count in enumerate(found)
        if count < token_floor
    }


def is_starved(name: str, counts: Counts) -> bool:
    return any(name.startswith(prefix) for prefix in starved(counts))


def test_counts_are_those_of_a_plain_loop_over_the_routers_choices(
    source: Path,
    settings: QuantizeSettings,
    run: Callable[..., tuple[Checkpoint, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    exact_products: None,
) -> None:
    checkpoint, manifest = run(recipe())
    inputs = inputs_of_linears(checkpoint.folder, list(samples_of(source, settings).ids), monkeypatch)
    wanted: Counts = {}
    for layer in checkpoint.config.sparse_layers:
        router = checkpoint.read(f"{block_name(layer)}.mlp.gate.weight").astype(np.float64)
        counts = [0] * EXPERTS
        for x in inputs[f"{block_name(layer)}.mlp.gate"].double().numpy():
            counts[int(np.argmax(router @ x))] += 1
        wanted[block_name(layer)] = counts
    found = manifest["experts"]
    assert found["tokens_per_expert"] == wanted
    flat = [count for layer in wanted.values() for count in layer]
    assert sum(flat) == SAMPLES * LENGTH * len(checkpoint.config.sparse_layers)
    assert flat[NEVER] == found["min_tokens"] == 0
    assert found["below_floor"] == sum(count < FLOOR for count in flat)
    assert 2 < found["below_floor"] < len(flat)
    assert (found["floor"], found["fallback"]) == (FLOOR, "share")


def test_an_expert_below_the_floor_shares_the_layers_inputs_in_proportion(
    source: Path,
    settings: QuantizeSettings,
    run: Callable[..., tuple[Checkpoint, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    exact_products: None,
) -> None:
    # Fewer than the calibration has, so that a part of the tokens stands for all at down_proj.
    monkeypatch.setattr(experts_module, "SAMPLE_TOKENS", 200)
    found: list[tuple[Checkpoint, dict[str, Any]]] = []
    groups = spied(monkeypatch, lambda: found.append(run(recipe())))
    checkpoint, manifest = found[0]
    monkeypatch.undo()
    inputs = inputs_of_linears(checkpoint.folder, list(samples_of(source, settings).ids), monkeypatch)
    counts = manifest["experts"]["tokens_per_expert"]
    for name, group in groups.items():
        width = group.weights[name].shape[1]
        own = inputs.get(name, torch.empty(0, width)).double()
        wanted = own.T @ own / max(len(own), 1)
        if is_starved(name, counts):
            assert manifest["tensors"][name]["calibrated_on"] == "shared"
            layer = layer_inputs(name, checkpoint, inputs)
            wanted = (len(own) * wanted + (FLOOR - len(own)) * (layer.T @ layer / len(layer))) / FLOOR
        else:
            assert "calibrated_on" not in manifest["tensors"][name]
        assert group.tokens == len(own) == manifest["tensors"][name]["tokens"]
        np.testing.assert_allclose(group.hessian, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert len(starved(counts)) == manifest["experts"]["below_floor"]


def layer_inputs(name: str, checkpoint: Checkpoint, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What stands for the layer's tokens at one expert's linear, `[n, in]` in fp64."""
    common = inputs[f"{name.split('.mlp.')[0]}.mlp.gate"].double()
    if not name.endswith("down_proj"):
        return common
    positions = [step * len(common) // 200 for step in range(200)]
    gate, up = (weight_of(checkpoint, name.replace("down_proj", part)).double() for part in ("gate_proj", "up_proj"))
    return F.silu(common[positions] @ gate.T) * (common[positions] @ up.T)


def weight_of(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    tensor = checkpoint.linear(module)
    assert isinstance(tensor, QuantizedTensor)
    return torch.from_numpy(dequantize(tensor))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_expert_is_solved_well_by_every_method(
    source: Path, run: Callable[..., tuple[Checkpoint, dict[str, Any]]], method: tuple[str, dict[str, Any]]
) -> None:
    original = open_checkpoint(source)
    for fallback in ("share", "rtn"):
        checkpoint, manifest = run(recipe(method[0], fallback, **method[1]))
        assert set(checkpoint.schemes) == set(original.config.all_linears())
        counts = manifest["experts"]["tokens_per_expert"]
        assert starved(counts)
        for name, item in manifest["tensors"].items():
            below = is_starved(name, counts)
            assert item["method"] == ("rtn" if below and fallback == "rtn" else method[0])
            assert item.get("calibrated_on") == ("shared" if below and fallback == "share" else None)
            assert 0 < item["error"] < 0.05
        if "fold" not in method[1] and method[0] != "awq":
            for layer in original.config.sparse_layers:
                router = f"{block_name(layer)}.mlp.gate.weight"
                assert checkpoint.read(router).tobytes() == original.read(router).tobytes()
            for name in manifest["tensors"]:
                weight = torch.from_numpy(original.read(f"{name}.weight").astype(np.float32))
                error = (weight_of(checkpoint, name) - weight).square().sum() / weight.square().sum()
                assert error < 0.05, name


def test_the_rtn_fallback_is_the_rtn_method(run: Callable[..., tuple[Checkpoint, dict[str, Any]]]) -> None:
    mixed, manifest = run(recipe("gptq", "rtn", percdamp=0.02))
    rounded, theirs = run(recipe("rtn", scale_search="mse"))
    counts = manifest["experts"]["tokens_per_expert"]
    for name in manifest["tensors"]:
        ours, wanted = mixed.linear(name), rounded.linear(name)
        assert isinstance(ours, QuantizedTensor)
        assert isinstance(wanted, QuantizedTensor)
        below = is_starved(name, counts)
        assert ((ours.codes == wanted.codes).all() and (ours.scales == wanted.scales).all()) == below
        assert (manifest["tensors"][name]["error"] == theirs["tensors"][name]["error"]) == below


@pytest.mark.parametrize("fallback", ["share", "rtn"])
def test_a_static_input_scale_covers_the_layers_tokens(
    run: Callable[..., tuple[Checkpoint, dict[str, Any]]], fallback: str
) -> None:
    scheme = {"num_bits": 8, "strategy": "channel", "group_size": None, "activations": "static-tensor"}
    checkpoint, manifest = run(recipe("rtn", fallback, scheme=scheme))
    scales = {name: checkpoint.linear(name).input_scale for name in manifest["tensors"]}  # type: ignore[union-attr]
    for layer in checkpoint.config.sparse_layers:
        prefix = f"{block_name(layer)}.mlp.experts."
        for part in ("gate_proj", "down_proj"):
            reached = [scales[f"{prefix}{e}.{part}"] for e in range(EXPERTS) if e != NEVER]
            assert 0.3 * min(reached) < scales[f"{prefix}{NEVER}.{part}"] < 3 * max(reached)


def test_a_floor_of_zero_turns_the_rule_off(run: Callable[..., tuple[Checkpoint, dict[str, Any]]]) -> None:
    _, manifest = run(recipe(token_floor=0))
    assert manifest["experts"]["min_tokens"] == manifest["experts"]["below_floor"] == 0
    assert not any("calibrated_on" in item for item in manifest["tensors"].values())


def test_the_default_floor_is_twice_the_widest_input(run: Callable[..., tuple[Checkpoint, dict[str, Any]]]) -> None:
    _, manifest = run(recipe(token_floor=None))
    assert manifest["experts"]["floor"] == 2 * 64


def test_a_fold_at_the_norm_sees_all_tokens_even_if_the_first_expert_sees_none(
    tmp_path: Path, source: Path, settings: QuantizeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: dict[str, int] = {}
    plain = fold.search_scales

    def spy(kind: str, site: Any, block: Any, moments: Any, *rest: Any) -> Any:
        tokens[site.source] = moments.tokens
        return plain(kind, site, block, moments, *rest)

    monkeypatch.setattr(fold, "search_scales", spy)
    quantize(open_checkpoint(source), recipe("awq"), tmp_path / "out", settings)
    # Every eighth of 11 rows.
    assert tokens["post_attention_layernorm"] == 2 * LENGTH
    # Mixed up to an eighth of the floor.
    assert tokens[f"mlp.experts.{NEVER}.up_proj"] == -(-FLOOR // 8)


@pytest.mark.parametrize("fallback", ["share", "rtn"])
def test_neither_threads_nor_a_stop_change_a_byte(
    source: Path, settings: QuantizeSettings, tmp_path: Path, fallback: str
) -> None:
    checkpoint, chosen = open_checkpoint(source), recipe("gptq", fallback, target_shift=True, fold="awq")
    quantize(checkpoint, chosen, tmp_path / "wanted", settings)
    quantize(checkpoint, chosen, tmp_path / "one", replace(settings, threads=1))
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, chosen, tmp_path / "stopped", settings, Interrupted(1))
    assert quantize(checkpoint, chosen, tmp_path / "stopped", settings)["resumed_blocks"] == 1
    wanted = hashes(tmp_path / "wanted")
    assert hashes(tmp_path / "one") == wanted
    assert hashes(tmp_path / "stopped") == wanted


def test_a_run_with_another_rule_is_another_run(source: Path, settings: QuantizeSettings, tmp_path: Path) -> None:
    rules = [recipe(), recipe(fallback="rtn"), recipe(token_floor=FLOOR + 1), recipe(token_floor=None)]
    assert len({rule.sha256 for rule in rules}) == len(rules)


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.warned: list[str] = []

    def log(self, text: str) -> None:
        self.logged.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def test_starved_experts_are_reported(run: Callable[..., tuple[Checkpoint, dict[str, Any]]]) -> None:
    told = Told()
    _, manifest = run(recipe(), progress=told)
    below = manifest["experts"]["below_floor"]
    assert [line for line in told.logged if line.startswith("experts:")] == [
        f"experts: 8, each saw 0 calibration tokens or more; {below} fewer than {FLOOR}"
    ]
    assert len(told.warned) == 1
    assert f"{below} of 8 experts saw fewer than {FLOOR} calibration tokens" in told.warned[0]
    enough, plain = Told(), Told()
    run(recipe(token_floor=0), progress=enough)
    run(recipe("rtn"), progress=plain)
    assert enough.warned == plain.warned == []


def test_the_result_holds_the_summary_and_the_manifest_the_counts(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    result = quantize(open_checkpoint(source), recipe(), tmp_path / "out", settings)
    counts = read_manifest(tmp_path / "out")["experts"].pop("tokens_per_expert")
    summary = {key: value for key, value in read_manifest(tmp_path / "out")["experts"].items() if key in UNCOUNTED}
    assert result["experts"] == summary
    assert set(summary) == UNCOUNTED
    assert list(counts) == [block_name(0), block_name(1)]
    assert "experts" in json.loads((tmp_path / "out" / "qwen3-export.json").read_text())["recipe"]


UNCOUNTED = {"min_tokens", "below_floor", "floor", "fallback"}


def live_hessians(
    folder: Path, settings: QuantizeSettings, output: Path, chosen: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """The most moments alive whenever new ones are collected, and how often that was."""
    alive: list[weakref.ref] = []
    most, plain = [0], forward.collect_moments

    def spy(*arguments: Any) -> Any:
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        moments = plain(*arguments)
        alive.append(weakref.ref(moments.hessian))
        return moments

    monkeypatch.setattr(forward, "collect_moments", spy)
    monkeypatch.setattr(experts_module, "collect_moments", spy)
    gc.disable()
    try:
        quantize(open_checkpoint(folder), chosen, output, settings)
    finally:
        gc.enable()
        monkeypatch.undo()
    return most[0], len(alive)


@pytest.mark.parametrize("fallback", ["share", "rtn"])
def test_the_moments_of_one_expert_are_in_memory_at_a_time(
    settings: QuantizeSettings, tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch, fallback: str
) -> None:
    most = []
    for experts in (4, 16):
        folder = make_source(tmp_path / f"moe-{experts}", reference_folder, num_experts=experts, num_hidden_layers=1)
        chosen = recipe("gptq", fallback, token_floor=10_000)
        found, collected = live_hessians(folder, settings, tmp_path / f"out-{experts}", chosen, monkeypatch)
        assert collected > 3 * experts
        most.append(found)
    # Those of the rows that are not held out, or an expert's own, when the layer's are collected.
    assert most == [1, 1]
