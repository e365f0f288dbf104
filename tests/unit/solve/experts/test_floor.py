"""Experts that fewer tokens reach than the floor: what they are solved against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.solve.blocks import fold
from qwen3_export.solve.calibration import experts as experts_module
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples, calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.unit.solve.experts.support import EXPERTS, FLOOR, LENGTH, NEVER, SAMPLES, recipe
from tests.unit.solve.support import inputs_of_linears, spied

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {}),
    "gptq shifted": ("gptq", {"target_shift": True}),
    "gptq folded": ("gptq", {"fold": "awq"}),
    "awq": ("awq", {}),
    "rtn weighted": ("rtn", {"scale_search": "hessian"}),
}
Counts = dict[str, list[int]]


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
