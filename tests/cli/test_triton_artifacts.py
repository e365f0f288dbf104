"""Artifacts that a Triton repository takes: all parts of a split model; nothing that no server could start."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest

import qwen3_export
from qwen3_export.prove.latency import weight_bytes
from qwen3_export.run.artifact import artifact_bytes
from qwen3_export.run.generate import Sampling, chat
from tests.cli.helpers import call, names, refused

_QUESTION = [{"role": "user", "content": "What does ocean mean?"}]


@pytest.fixture(scope="module")
def split(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The parts of a split GGUF file."""
    folder = tmp_path_factory.mktemp("split")
    command = ("gguf", model, "--type", "q4_0", "--split-max-size", "1M")
    outcome = call(*command, "--output", folder / "model.gguf")
    assert outcome.code == 0, outcome.err
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) > 1
    return parts


def test_all_parts_of_a_split_model_are_served(split: list[Path], tmp_path: Path) -> None:
    """Whichever part was named; llama.cpp opens what the server is told to open."""
    wanted = {part.name.removeprefix("model"): part.read_bytes() for part in split}
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in split)).hexdigest()
    for number, part in enumerate((split[0], split[-1])):
        place = tmp_path / str(number)
        outcome = call("triton", part, "--output", place)
        assert outcome.code == 0, outcome.err
        found = {file.name.removeprefix("artifact"): file.read_bytes() for file in place.glob("qwen3/1/*.gguf")}
        assert found == wanted
        [described] = call("inspect", place, "--json").json["models"]
        opened = place / "qwen3/1" / described["parameters"]["artifact"]
        sampling = Sampling(max_new_tokens=4)
        assert chat(opened, _QUESTION, False, sampling)["text"] == chat(split[0], _QUESTION, False, sampling)["text"]
        assert digest in (place / "README.md").read_text()


def test_caches_beside_the_modules_are_not_copied(
    split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As linters and type checkers leave them in a working copy."""
    package = tmp_path / "package"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(qwen3_export.__file__).parent, package, ignore=ignored)
    (package / "run" / ".cache").mkdir()
    (package / "run" / ".cache" / "kept").touch()
    monkeypatch.setattr("qwen3_export.ship.triton._PACKAGE", package)
    assert call("triton", split[0], "--output", tmp_path / "repository").code == 0
    assert (tmp_path / "repository/qwen3/1/qwen3_export/run/session.py").is_file()
    assert not [path for path in (tmp_path / "repository").rglob("*") if path.name.startswith(".")]


def test_any_part_stands_for_the_whole_model(split: list[Path], tmp_path: Path) -> None:
    """In `run`, and in a report, whose size is that of all parts."""
    text = [call("run", part, "--prompt", "hi", "--max-new-tokens", "4", "--json").json["text"] for part in split]
    assert len(set(text)) == 1
    assert artifact_bytes(split[-1]) == weight_bytes(split[-1]) == sum(part.stat().st_size for part in split)
    alone = shutil.copyfile(split[-1], tmp_path / split[-1].name)
    refused(call("run", alone, "--prompt", "hi"), 2, split[0].name, "is missing", "keep all parts in one folder")


def test_parts_that_are_missing_or_misnamed_are_refused(split: list[Path], tmp_path: Path) -> None:
    def asked(artifact: Path, *words: str) -> None:
        refused(call("triton", artifact, "--output", tmp_path / "out"), 2, *words)
        assert not (tmp_path / "out").exists()

    folder = tmp_path / "parts"
    shutil.copytree(split[0].parent, folder)
    first, last = folder / split[0].name, folder / split[-1].name
    alone = folder / "alone.gguf"
    shutil.copyfile(first, alone)
    asked(alone, "alone.gguf: by its header it is part 1 of", "by its name 1 of 1", "PREFIX-00001-of-")
    first.rename(folder / "kept")
    asked(last, first.name, "is missing", "keep all parts in one folder")
    shutil.copyfile(last, first)
    asked(last, f"{first.name}: by its header it is part {len(split)} of", "by its name 1 of")
    assert names(tmp_path) == ["parts"]


def _cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def _other_graph(folder: Path) -> None:
    """An ONNX of one node, in place of the decoder."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    onnx.save(onnx.helper.make_model(graph), folder / "model.onnx")


def _name_engine(folder: Path, engine: object) -> None:
    values = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**values, "engine": engine}))


# What is broken, how, and words of the refusal: the file, what was found, the remedy.
BROKEN: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "gguf half": ("gguf", _cut, ("model.gguf: tensor ", "the file is truncated")),
    "gguf header": ("gguf", lambda path: _cut(path, 0.001), ("model.gguf: not a GGUF file (it is truncated)",)),
    "no data": ("onnx", lambda path: (path / "model.onnx.data").unlink(), ("model.onnx.data: missing", "hint: ")),
    "short data": ("onnx", lambda path: _cut(path / "model.onnx.data"), ("model.onnx.data: ", "is truncated")),
    "cut graph": ("onnx", lambda path: _cut(path / "model.onnx"), ("model.onnx: not an ONNX model",)),
    "no decoder": ("onnx", _other_graph, ("model.onnx: ", "hint: give the folder of a decoder")),
    "no tokenizer": ("onnx", lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json: missing", "hint: ")),
    "cut tokenizer": ("onnx", lambda path: _cut(path / "tokenizer.json"), ("tokenizer.json",)),
    "tokenizer": ("onnx", lambda path: (path / "tokenizer.json").write_text("{}") and None, ("tokenizer.json",)),
    "empty plan": ("tensorrt", lambda path: _cut(path / "model.plan", 0), ("model.plan: ", "it is empty", "export")),
    "half a plan": ("tensorrt", lambda path: _cut(path / "model.plan"), ("model.plan: ", "the file has ")),
    "plan's magic": ("tensorrt", lambda path: _change(path / "model.plan", 0), ("model.plan: ", "begins with b'vtrt'")),
    "plan's version": ("tensorrt", lambda path: _change(path / "model.plan", 24), ("model.plan: ", "of version ")),
    "plan's devices": ("tensorrt", lambda path: _change(path / "model.plan", 32), ("model.plan: ", "capabilities")),
    "plan's weights": ("tensorrt", lambda path: _change(path / "model.plan", -1), ("model.plan: ", "its sha256 is ")),
    "plan alone": ("tensorrt", lambda path: (path / "model.onnx").unlink(), ("model.onnx: missing", "hint: ")),
    "plan's tokenizer": ("tensorrt", lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json: missing",)),
    "short weights": ("quantized", lambda path: _cut(next(path.glob("*.safetensors"))), ("safetensors: ",)),
    "vllm's tokenizer": ("quantized", lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json: missing",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_no_server_could_start_is_refused(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    kind, damage, words = BROKEN[name]
    artifact = tmp_path / made[kind].name
    (shutil.copyfile if made[kind].is_file() else shutil.copytree)(made[kind], artifact)
    assert call("triton", artifact, "--output", tmp_path / "sound").code == 0
    damage(artifact)
    refused(call("triton", artifact, "--output", tmp_path / "out"), 2, *words)
    assert names(tmp_path) == sorted([artifact.name, "sound"])


def test_an_importance_matrix_is_no_model(model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.gguf"
    assert call("calibrate", model, "--samples", "2", "--sequence-length", "32", "--output", matrix).code == 0
    refused(call("triton", matrix, "--output", tmp_path / "out"), 2, "matrix.gguf: an importance matrix", "hint: ")
    assert names(tmp_path) == ["matrix.gguf"]


@pytest.mark.parametrize("kind", ["adapter", "no vocabulary", "no weights"])
def test_gguf_files_of_other_purposes_are_no_models(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    if kind == "adapter":
        writer.add_type("adapter")
    if kind != "no vocabulary":
        writer.add_token_list(["a", "b"])
    if kind != "no weights":
        writer.add_tensor("output.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = {"adapter": "general.type is adapter", "no vocabulary": "no vocabulary", "no weights": "no weights"}
    refused(call("triton", path, "--output", tmp_path / "out"), 2, f"{path}: ", words[kind])


@pytest.mark.parametrize("engine", [5, "foo", None, ["rtx"]])
def test_an_unknown_engine_is_refused_by_name(engine: object, made: dict[str, Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(made["tensorrt"], artifact)
    _name_engine(artifact, engine)
    commands = (
        ("triton", artifact, "--output", tmp_path / "out"),
        ("inspect", artifact),
        ("run", artifact, "--prompt", "hi"),
        ("run", artifact, "--prompt", "hi", "--device", "cpu"),
    )
    for command in commands:
        refused(call(*command), 2, "engine.json: engine is ", str(engine), "one of rtx, trt was expected")
    (artifact / "model.plan").unlink()
    for command in commands:
        refused(call(*command), 2, "engine.json: engine is ", str(engine))


def test_inspect_tells_a_damaged_plan(made: dict[str, Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(made["tensorrt"], artifact)
    assert "damaged:" not in call("inspect", artifact).out
    _cut(artifact / "model.plan", 0)
    assert "model.plan, 0 B, damaged: it is empty" in " ".join(call("inspect", artifact).out.split())
