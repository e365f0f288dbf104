"""`--kv-cache int8` and `int4`: the folder runs in our session, in plain ONNX Runtime and in onnxruntime-genai, its
cache is as small as it says, and what it costs is measured as it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError
from qwen3_export.prove.cache import cache_cost, cache_scales
from qwen3_export.prove.rounding import level_cost
from qwen3_export.run.ort import OrtSession
from qwen3_export.run.session import RuntimeOptions, greedy
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.artifact.support import THREADS, OnnxFolder, OnnxWeights, logits, mean_kl
from tests.artifact.test_genai import genai_greedy
from tests.cli.helpers import call, reported

# Largest KL that the codes may add, and their size beside fp32's.
LIMITS = {"int8": (2e-4, 0.26), "int4": (0.05, 0.14)}


def export_and_path(checkpoint: Checkpoint, output: Path, **options: Any) -> Path:
    export_onnx(checkpoint, output, **options)
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> dict[str, Path]:
    """The reference model, with each kind of cache."""
    base, checkpoint = tmp_path_factory.mktemp("cache"), open_source(str(source("original")))
    for kind in ("fp32", "int8", "int4"):
        export_onnx(checkpoint, base / kind, kv_cache=kind, study_cache=(cache_scales, cache_cost))
    return {kind: base / kind for kind in ("fp32", "int8", "int4")}


@pytest.mark.parametrize("kind", LIMITS)
def test_it_costs_what_the_manifest_says(folders: dict[str, Path], rows: list[NDArray], kind: str) -> None:
    manifest = json.loads((folders[kind] / "qwen3-export.json").read_text())
    measured = mean_kl(logits(folders["fp32"], rows), logits(folders[kind], rows))
    assert manifest["kv_cache"] == kind
    assert manifest["kv_cache_kl"] <= LIMITS[kind][0]
    # Prompts, as `validate` reads them, read the codes too: nothing is measured beside them.
    assert manifest["kv_cache_kl"] / 4 < measured <= LIMITS[kind][0]
    assert not (folders[kind] / "plain-cache").exists()


def test_the_costs_of_cache_and_level_add_up(onnx_folder: OnnxFolder, rows: list[NDArray], tmp_path: Path) -> None:
    """Beside rounded activations, too, a cache costs what it adds to the folder's drift."""
    checkpoint, study = onnx_folder("edge-w4").source, (cache_scales, cache_cost)
    truth = logits(export_and_path(checkpoint, tmp_path / "exact", accuracy_level=0), rows)
    found = {}
    for kind in ("fp32", "int8", "int4"):
        folder = export_and_path(checkpoint, tmp_path / kind, kv_cache=kind, study_cache=study, measure=level_cost)
        manifest = json.loads((folder / "qwen3-export.json").read_text())
        found[kind] = (manifest["added_kl"], manifest.get("kv_cache_kl", 0.0), mean_kl(truth, logits(folder, rows)))
    assert len({level for level, _, _ in found.values()}) == 1, "the level's cost has nothing to do with the cache"
    plain = found["fp32"][2]
    for kind, (most, _) in LIMITS.items():
        _, cost, drift = found[kind]
        # Other text, the same order; prompts read the codes, as `validate` does.
        assert cost <= most
        assert (drift - plain) / 4 < cost < (drift - plain) * 4


@pytest.mark.parametrize("kind", LIMITS)
def test_the_cache_is_small(folders: dict[str, Path], rows: list[NDArray], kind: str) -> None:
    sizes = {}
    for name in ("fp32", kind):
        session = OrtSession(folders[name], RuntimeOptions(threads=THREADS))
        session.prefill(rows[0])
        sizes[name] = sum(values.nbytes for values in session.cache_values().values())
        session.close()
    assert sizes[kind] <= LIMITS[kind][1] * sizes["fp32"]


@pytest.mark.parametrize("kind", LIMITS)
def test_scales_in_the_graph_are_those_of_the_manifest(folders: dict[str, Path], kind: str) -> None:
    manifest, weights = json.loads((folders[kind] / "qwen3-export.json").read_text()), OnnxWeights(folders[kind])
    for layer, scales in enumerate(manifest["kv_cache_scales"]):
        key, value = weights.inputs(f"layer.{layer}.attention")[12:14]
        np.testing.assert_array_equal(key[:, 0], np.array(scales["key"], np.float32))
        np.testing.assert_array_equal(value[:, 0], np.array(scales["value"], np.float32))
        # Channels of a rotated pair share their scale.
        assert (key[..., : key.shape[-1] // 2] == key[..., key.shape[-1] // 2 :]).all()
    assert len(manifest["kv_cache_scales"]) == 6


@pytest.mark.parametrize("kind", LIMITS)
def test_decoding_while_the_cache_grows_equals_one_prefill(
    folders: dict[str, Path], rows: list[NDArray], kind: str
) -> None:
    session, ids = OrtSession(folders[kind], RuntimeOptions(threads=THREADS)), np.concatenate(rows)[:264]
    whole = session.prefill(ids)
    pieces = [session.prefill(ids[:250]), *(session.decode(int(token))[None] for token in ids[250:])]
    session.close()
    assert mean_kl([whole[250:]], [np.concatenate(pieces)[250:]]) < LIMITS[kind][0]


@pytest.mark.parametrize("kind", LIMITS)
def test_genai_runs_it(folders: dict[str, Path], tokenizer: ModelTokenizer, kind: str) -> None:
    ids = tokenizer.encode("The quick brown fox")
    session = OrtSession(folders[kind], RuntimeOptions(threads=THREADS))
    ours = greedy(session, ids, 8).tolist()
    session.close()
    assert genai_greedy(genai.Model(str(folders[kind])), ids, max_length=len(ids) + 8) == ours


def test_what_has_no_such_cache_is_refused(source: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_source(str(source("original")))
    for options in ({"flavor": "standard"}, {"precision": "fp16"}, {"target": "web"}):
        with pytest.raises(InputError, match="--kv-cache int8"):
            export_onnx(checkpoint, tmp_path / "out", kv_cache="int8", **options)
    with pytest.raises(InputError, match="one of fp32, int8, int4"):
        export_onnx(checkpoint, tmp_path / "out", kv_cache="int2")
    with pytest.raises(InputError, match="--kv-cache fp32: beside fp16 activations the cache is fp16"):
        export_onnx(checkpoint, tmp_path / "out", kv_cache="fp32", target="cuda")
    with pytest.raises(InputError, match="--kv-cache fp16: beside fp32 activations the cache is fp32"):
        export_onnx(checkpoint, tmp_path / "out", kv_cache="fp16")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--target", "cuda"), "fp16"),
        (("--target", "web", "--kv-cache", "fp16"), "fp16"),
        (("--target", "standard", "--precision", "bf16"), "bf16"),
        (("--target", "cpu", "--kv-cache", "fp32"), "fp32"),
    ],
)
def test_the_result_names_the_cache_that_was_written(
    source: Callable[[str], Path], tmp_path: Path, options: tuple[str, ...], kind: str
) -> None:
    outcome = call("onnx", source("original"), "--output", tmp_path / "out", "--json", *options)
    assert reported(outcome, "onnx")["kv_cache"] == kind
