"""A folder run part by part gives what the whole gives, exactly and as it runs, however small the parts are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError
from qwen3_export.prove.cache import cache_cost, cache_scales
from qwen3_export.prove.divergence import divergence
from qwen3_export.prove.rounding import level_cost
from qwen3_export.run.artifact import open_session
from qwen3_export.run.parted import PartedModel
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import SAME, OnnxFolder, largest_difference, logits, mean_kl, random_ids, round_to_nearest
from tests.conftest import tiny_config, tiny_moe_config

W4, W8 = QuantScheme(4, group_size=32), QuantScheme(8, group_size=32)
# The reference model: an unquantized tied head, 8 bits, a quantized tied head, int8 inputs; and as standard operators.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("gptq-w4a16-g128", {}),
    "8 bits": ("rtn-w8a16", {}),
    "edge": ("edge-w4", {}),
    "int8 inputs": ("int8-dynamic", {}),
    "fp16": ("gptq-w4a16-g32-asym", {"precision": "fp16", "accuracy_level": 4}),
    "standard": ("gptq-w4a16-g128", {"flavor": "standard", "accuracy_level": 4}),
    "standard, edge": ("edge-w4", {"flavor": "standard", "accuracy_level": 4}),
    "standard, opset 21": ("rtn-w8a16", {"flavor": "standard", "accuracy_level": 4, "opset": 21}),
}
# Random models: what is quantized, and how the export is made.
RANDOM: dict[str, tuple[dict[str, Any], tuple[tuple[str, QuantScheme], ...], dict[str, Any]]] = {
    "untied": (tiny_config(tie_word_embeddings=False), (("*", W4),), {}),
    "untied, quantized head": (
        tiny_config(tie_word_embeddings=False),
        (("lm_head", W8), ("model.embed_tokens", W8), ("*", W4)),
        {},
    ),
    # A row of its zero points ends in the middle of a byte.
    "standard, rows of three groups": (
        tiny_config(hidden_size=96),
        (("model.embed_tokens", QuantScheme(4, symmetric=False, group_size=32)), ("*", W4)),
        {"flavor": "standard"},
    ),
    "experts": (tiny_moe_config(hidden_size=64, moe_intermediate_size=64), (("*", W4),), {}),
    "experts in a loop": (tiny_moe_config(moe_intermediate_size=64), (("*", W4),), {"flavor": "standard"}),
}


@pytest.fixture(params=[1, 1 << 40], ids=["smallest parts", "one part"])
def part_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A size of parts; with 1 every layer is one, and a head is cut into as many pieces as can be."""
    monkeypatch.setattr("qwen3_export.run.graph_parts.PART_BYTES", request.param)
    return request.param


def check(folder: Path, prompts: list[NDArray], layers: int, head_pieces: int) -> None:
    """Both streams of a model in parts beside two whole sessions; one part where `head_pieces` is 0."""
    model, calls = PartedModel(folder), [[ids] for ids in prompts]
    assert len(model.graph.parts) == (layers + 2 + head_pieces if head_pieces else 1)
    exact, rounded = [], []
    for piece in model.logits(model.stream(calls, exact=True), model.stream(calls)):
        exact.append(piece[0])
        rounded.append(piece[1])
    wanted = logits(folder, prompts, exact=True), logits(folder, prompts)
    found = [[np.concatenate(pieces, -1) for pieces in zip(*stream, strict=True)] for stream in (exact, rounded)]
    assert largest_difference(wanted[0], found[0]) < SAME
    # A sum in another order turns some activations at the edge between two codes from one to the other.
    assert mean_kl(wanted[1], found[1]) <= 1e-3 * mean_kl(*wanted) + 1e-9


@pytest.mark.parametrize("name", FOLDERS)
def test_parts_give_what_the_whole_gives(
    onnx_folder: OnnxFolder, rows: list[NDArray], part_bytes: int, name: str
) -> None:
    recipe, options = FOLDERS[name]
    pieces = 8192 // 64 if part_bytes == 1 else 0
    check(onnx_folder(recipe, **options).path, rows[:3], layers=6, head_pieces=pieces)


@pytest.mark.parametrize("name", RANDOM)
def test_parts_of_random_models(make_checkpoint: Callable, tmp_path: Path, part_bytes: int, name: str) -> None:
    config, rules, options = RANDOM[name]
    checkpoint = round_to_nearest(make_checkpoint(config), tmp_path / "quantized", *rules)
    export_onnx(checkpoint, tmp_path / "onnx", accuracy_level=4, **options)
    pieces = 320 // 64 if part_bytes == 1 else 0
    check(tmp_path / "onnx", [random_ids(17), random_ids(9, seed=8)], layers=2, head_pieces=pieces)


@pytest.mark.usefixtures("part_bytes")
def test_tokens_decoded_one_by_one(onnx_folder: OnnxFolder, rows: list[NDArray]) -> None:
    folder, ids = onnx_folder("gptq-w4a16-g128").path, rows[0][:24]
    session = open_session(folder, RuntimeOptions(threads=1))
    wanted = np.concatenate([session.prefill(ids[:16]), *(session.decode(int(token))[None] for token in ids[16:])])
    session.close()
    model = PartedModel(folder)
    pieces = [found for [[found]] in model.logits(model.stream([[ids[:16], *ids[16:, None]]]))]
    assert largest_difference([wanted], [np.concatenate(pieces, -1)]) < SAME


@pytest.mark.parametrize("size", [1, 1 << 40], ids=["one level after the other", "both at once"])
def test_a_batch_gives_what_its_rows_give(
    onnx_folder: OnnxFolder, rows: list[NDArray], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("qwen3_export.run.graph_parts.PART_BYTES", size)
    folder, batch = onnx_folder("edge-w4").path, np.stack([ids[:8] for ids in rows[:3]])
    model = PartedModel(folder)
    streams = model.stream([[batch]], exact=True), model.stream([[batch]])
    pieces = list(model.logits(*streams))
    for stream, exact in enumerate((True, False)):
        wanted = np.concatenate(logits(folder, list(batch), exact=exact))
        found = np.concatenate([piece[stream][0] for piece in pieces], -1)
        assert mean_kl([wanted], [found]) < 1e-6


def test_a_quantized_cache_in_parts(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, found = open_source(str(source("gptq-w4a16-g128"))), []
    for size in (1, 1 << 40):
        monkeypatch.setattr("qwen3_export.run.graph_parts.PART_BYTES", size)
        output, study = tmp_path / str(size), (cache_scales, cache_cost)
        export_onnx(checkpoint, output, kv_cache="int8", study_cache=study, measure=level_cost)
        found.append(json.loads((output / "qwen3-export.json").read_text()))
    for key in ("kv_cache_kl", "added_kl"):
        assert found[0][key] == pytest.approx(found[1][key], rel=0.02)
    for one, other in zip(*(manifest["kv_cache_scales"] for manifest in found), strict=True):
        np.testing.assert_allclose(one["key"], other["key"], rtol=0.01)
        np.testing.assert_allclose(one["value"], other["value"], rtol=0.01)


def test_what_no_model_is_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="not an ONNX model"):
        PartedModel(tmp_path)


def test_pieces_of_the_vocabulary_add_up_to_the_divergence() -> None:
    random = np.random.default_rng(0)
    truth = [8 * random.standard_normal((tokens, 1000)).astype(np.float32) for tokens in (40, 3)]
    # The largest logits come last, so that sums shrink on the way.
    truth[0][:, -1] += 60
    found = [a + 0.1 * random.standard_normal(a.shape).astype(np.float32) for a in truth]
    cuts = [slice(0, 10), slice(10, 700), slice(700, 1000)]
    got = divergence(([a[:, cut] for a in truth], [b[:, cut] for b in found]) for cut in cuts)
    assert len(got) == 43
    assert got.mean() == pytest.approx(mean_kl(truth, found), rel=1e-5)
