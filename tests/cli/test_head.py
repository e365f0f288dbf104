"""A recipe that names embedding and head, from the command line: killed and resumed, inspected, exported, refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.recipe import load_recipe
from tests.cli.helpers import call, finish, hashes, names, refused, start, wait_for, write_text_model

RECIPE = "gptq-w4a16-g128-head8"
OPTIONS = ("--recipe", RECIPE, "--samples", "8", "--sequence-length", "64")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: write_text_model(base / name, tie_word_embeddings=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and JSON result of both models."""
    base, made = tmp_path_factory.mktemp("quantized"), {}
    for name, model in models.items():
        outcome = call("quantize", model, *OPTIONS, "--output", base / name, "--json")
        assert outcome.code == 0, outcome.err
        made[name] = (base / name, outcome.json)
    return made


def test_one_recipe_fits_both(folders: dict[str, tuple[Path, Any]]) -> None:
    for name, (_, result) in folders.items():
        layers = {layer["name"]: layer for layer in result["layers"]}
        assert layers["model.embed_tokens"]["scheme"]["num_bits"] == 8
        assert ("lm_head" in layers) == (name == "untied")
        assert layers["model.embed_tokens"]["method"] == ("gptq" if name == "tied" else "rtn")
        assert result["bits_per_weight"] < 9


def test_inspect_tells_of_them(folders: dict[str, tuple[Path, Any]]) -> None:
    tied, untied = (call("inspect", folders[name][0], "--json").json for name in ("tied", "untied"))
    assert (tied["embedding"], tied["lm_head"]) == ("w8-g32-sym", "tied to the embedding")
    assert (untied["embedding"], untied["lm_head"]) == ("w8-g32-sym", "w8-g32-sym")
    assert untied["quantized"] == {"w8-g32-sym": 2, "w4-g128-sym": 14}
    manifest = json.loads((folders["untied"][0] / "qwen3-export.json").read_text())
    assert (manifest["policy"]["embedding"], manifest["policy"]["lm_head"]) == ("w8-g32-sym", "w8-g32-sym")


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_every_artifact_is_as_near_as_its_folder(
    models: dict[str, Path], folders: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    folder = folders[name][0]
    commands = {
        "ort": ("onnx", folder, "--output", tmp_path / "ort", "--accuracy-level", "0"),
        "standard": ("onnx", folder, "--output", tmp_path / "standard", "--flavor", "standard"),
        "gguf": ("gguf", folder, "--output", tmp_path / "model.gguf"),
    }
    for command in commands.values():
        assert call(*command, "--json").json["exact"] is True
    paths = (folder, tmp_path / "ort", tmp_path / "standard", tmp_path / "model.gguf")
    measured = call("validate", *paths, "--reference", models[name], "--tokens", "512", "--exact", "--json").json
    drifts = [result["kl_mean"] for result in measured["results"]]
    assert drifts[0] > 0
    for drift in drifts[1:3]:
        assert drift == pytest.approx(drifts[0], rel=1e-3)
    # llama.cpp rounds inputs to 8 bits.
    assert drifts[3] == pytest.approx(drifts[0], rel=0.1)


def head_done(output: Path) -> bool:
    """Whether an unfinished run has all blocks, so that it is at its head."""
    try:
        saved = json.loads((output.with_name(f"{output.name}.partial") / "state" / "progress.json").read_text())
    except (OSError, ValueError):
        return False
    return len(saved["blocks"]) == 2


def test_a_run_killed_at_its_head_goes_on(
    models: dict[str, Path], folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    process = start("quantize", models["untied"], *OPTIONS, "--output", tmp_path / "out")
    wait_for(lambda: head_done(tmp_path / "out"), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert names(tmp_path) == ["out.partial"]
    outcome = call("quantize", models["untied"], *OPTIONS, "--output", tmp_path / "out", "--json", "--threads", "1")
    assert outcome.json["resumed_blocks"] == 2
    assert hashes(tmp_path / "out") == hashes(folders["untied"][0])


def test_a_head_apart_from_a_tied_embedding_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    values = load_recipe(RECIPE).to_dict()
    values["rules"] = [rule for rule in values["rules"] if rule["match"] != "model.embed_tokens"]
    (tmp_path / "head.yaml").write_text(json.dumps(values))
    options = ("--recipe", tmp_path / "head.yaml", "--output", tmp_path / "out")
    outcome = call("quantize", models["tied"], *options)
    refused(outcome, 2, "lm_head is to be w8-g32-sym", "ties it to model.embed_tokens", "a rule for model.embed_tokens")
    assert names(tmp_path) == ["head.yaml"]


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_layouts_without_a_place_for_it_say_so(models: dict[str, Path], tmp_path: Path, layout: str) -> None:
    options = ("--recipe", RECIPE, "--layout", layout, "--output", tmp_path / "out")
    refused(call("quantize", models["tied"], *options), 2, "model.embed_tokens", f"the {layout} layout")
    assert names(tmp_path) == []
