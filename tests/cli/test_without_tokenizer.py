"""A source without a tokenizer: what is written takes no text, and the command says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.helpers import call, names, refused

TOLD = "warning: {} has no tokenizer.json: what is written takes no text, "
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("--recipe", "rtn-w4a16-g32"),
    "onnx": ("--recipe", "rtn-w4a16-g32"),
    "tensorrt": ("--onnx-only",),
}


def _without(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_tokenizer_is_told(command: str, model: Path, tmp_path: Path) -> None:
    source = _without(model, tmp_path / "bare")
    line = (command, source, "--output", tmp_path / "out", *COMMANDS[command])
    outcome = call(*line, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(TOLD.format("bare")) == 1
    assert call(*line, "--force", "--quiet").err == ""


def test_cost_that_cannot_be_measured_names_the_source(model: Path, tmp_path: Path) -> None:
    """Not the folder that was called otherwise while it was written."""
    source = _without(model, tmp_path / "bare")
    quantized = ("--recipe", "rtn-w4a16-g32", "--accuracy-level", "4")
    found = call("onnx", source, "--output", tmp_path / "out", *quantized, "--json").json
    assert found["added_kl"] is None
    assert found["added_kl_reason"] == "bare/tokenizer.json: missing"
    manifest = json.loads((tmp_path / "out" / "qwen3-export.json").read_text())
    assert manifest["added_kl_reason"] == found["added_kl_reason"]


def test_what_needs_text_is_refused(model: Path, tmp_path: Path) -> None:
    source = _without(model, tmp_path / "bare")
    missing = (str(source / "tokenizer.json"), "hint: copy the tokenizer files of the original model")
    refused(call("onnx", source, "--kv-cache", "int8", "--output", tmp_path / "out"), 2, "--kv-cache int8", *missing)
    refused(call("gguf", source, "--output", tmp_path / "out"), 2, *missing)
    planned = call("plan", source, "--recipe", "rtn-w4a16-g32", "--format", "gguf", "--json")
    assert planned.code == 2
    assert json.loads(planned.out)["formats"]["gguf"]["supported"] is False
    assert f"gguf: a GGUF file holds the tokenizer, and {source / 'tokenizer.json'} is missing" in planned.err
    assert names(tmp_path) == ["bare"]


def test_older_form_is_a_tokenizer(model: Path, tmp_path: Path) -> None:
    source = _without(model, tmp_path / "older")
    stated = json.loads((model / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(stated["vocab"]))
    merges = (item if isinstance(item, str) else " ".join(item) for item in stated["merges"])
    (source / "merges.txt").write_text("\n".join(merges))
    outcome = call("quantize", source, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "tokenizer" not in outcome.err
