"""What a run must never do to others' files: foreign partials, inputs under `--force`, folders made in vain."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import MARKER, write_manifest
from qwen3_export.core.outputs import partial_path
from tests.cli.helpers import call, finish, hashes, names, refused, start, wait_for
from tests.conftest import write_checkpoint

Writer = Callable[[dict[str, Path], Path], tuple[Any, ...]]
WRITERS: dict[str, Writer] = {
    "quantize": lambda made, model: ("quantize", model, "--recipe", "rtn-w4a16-g32", "--output"),
    "onnx": lambda made, model: ("onnx", made["quantized"], "--output"),
    "gguf": lambda made, model: ("gguf", made["quantized"], "--output"),
    "gguf with a recipe": lambda made, model: ("gguf", model, "--recipe", "rtn-w4a16-g32", "--output"),
    "reference": lambda made, model: ("reference", model, "--tokens", "64", "--output"),
    "report": lambda made, model: ("validate", made["onnx"], "--reference", made["reference"], "--report"),
    "search": lambda made, model: ("recipes", "search", model, "--target-bpw", "5", "--output"),
    "triton": lambda made, model: ("triton", made["onnx"], "--output"),
}


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, made: dict[str, Path], model: Path) -> tuple[Any, ...]:
    return WRITERS[request.param](made, model)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_foreign_partial_is_never_touched(force: tuple[str, ...], writer: tuple[Any, ...], tmp_path: Path) -> None:
    precious, partial = tmp_path / "thesis", tmp_path / "out.partial"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    makers: tuple[Callable[[], object], ...] = (
        lambda: partial.write_text("years of work"),
        lambda: partial.symlink_to(precious / "thesis.txt"),
        lambda: partial.symlink_to(precious),
        lambda: os.link(precious / "thesis.txt", partial),
        lambda: os.mkfifo(partial),
    )
    for make in makers:
        make()
        refused(call(*writer, tmp_path / "out", *force), 2, "out.partial", "hint: ")
        assert (precious / "thesis.txt").read_text() == "years of work"
        assert names(tmp_path) == ["out.partial", "thesis"]
        partial.unlink()


def test_finished_artifact_called_partial_is_kept(
    writer: tuple[Any, ...], made: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("onnx", "quantized"):
        shutil.copytree(made[kind], tmp_path / "out.partial")
        before = hashes(tmp_path / "out.partial")
        refused(call(*writer, tmp_path / "out"), 2, "out.partial")
        assert hashes(tmp_path / "out.partial") == before
        shutil.rmtree(tmp_path / "out.partial")


def _spellings(source: Path, place: Path) -> dict[str, Path]:
    link = place / "link"
    link.symlink_to(source)
    (place / "sub").mkdir()
    return {
        "itself": source,
        "through a folder": place / "sub" / ".." / source.name,
        "inside": source / "deep" / "out",
        "inside, by a link": link / "out",
        "around": place,
    }


@pytest.mark.parametrize("kind", ["quantize", "onnx", "gguf", "gguf with a recipe", "reference", "report", "triton"])
def test_force_never_replaces_an_input(kind: str, made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    base = {"onnx": "quantized", "gguf": "quantized", "report": "onnx", "triton": "onnx"}.get(kind)
    source = tmp_path / "source"
    shutil.copytree(made[base] if base else model, source)
    command = WRITERS[kind]({**made, str(base): source}, model if base else source)
    spellings = _spellings(source, tmp_path)
    if kind in ("gguf", "reference"):
        shard = next(source.glob("*.safetensors"))
        (tmp_path / "hard").hardlink_to(shard)
        spellings |= {"a shard": shard, "a hard link to a shard": tmp_path / "hard"}
    before = hashes(tmp_path)
    for spelling, out in spellings.items():
        outcome = call(*command, out, "--force")
        assert outcome.code == 2, (spelling, outcome.err)
        refused(outcome, 2)
        assert hashes(tmp_path) == before, spelling


def test_file_over_a_text_that_is_read(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six " * 500)
    command = ("reference", model, "--text", text, "--window", "32", "--force", "--output")
    refused(call(*command, text), 2, "is the input")
    (tmp_path / "other").hardlink_to(text)
    refused(call(*command, tmp_path / "other"), 2, "under another name")
    assert text.read_text().startswith("one two")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(call("recipes", "show", "rtn-w4a16-g32").out)
    write_manifest(tmp_path, "test", {})
    refused(call("quantize", model, "--recipe", recipe, "--output", tmp_path, "--force"), 2, "recipe.yaml")


def test_file_over_tasks_or_an_importance_matrix(model: Path, tmp_path: Path) -> None:
    tasks, matrix = tmp_path / "tasks.jsonl", tmp_path / "matrix.gguf"
    assert call("tasks", "--count", "3", "--output", tasks).code == 0
    short = ("--samples", "2", "--sequence-length", "32")
    assert call("calibrate", model, *short, "--output", matrix).code == 0
    before = hashes(tmp_path)
    refused(call("reference", model, "--tasks", tasks, "--output", tasks, "--force"), 2, "is the input")
    refused(call("gguf", model, "--imatrix", matrix, "--output", matrix, "--force"), 2, "is the input")
    assert hashes(tmp_path) == before


def test_unfinished_run_is_no_source_of_its_own(made: dict[str, Path], tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    shutil.copytree(made["quantized"], partial)
    (partial / MARKER).touch()
    before = hashes(partial)
    refused(call("onnx", partial, "--output", tmp_path / "out"), 2, "out.partial")
    assert hashes(partial) == before


def test_folder_behind_links_of_a_hub_cache(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    """A snapshot's files are links to blobs: a blob is an input too."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        shutil.copyfile(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(blobs / f"blob-{path.name}")
    before = hashes(blobs)
    for out in (blobs / "blob-model.safetensors", blobs / "blob-config.json"):
        refused(call("gguf", snapshot, "--output", out, "--force"), 2, "of the input")
    assert hashes(blobs) == before


def test_new_folders_are_removed_when_the_run_fails(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "tokenizer.json").write_text("{}")
    out = tmp_path / "a" / "b" / "out"
    for command in (
        ("quantize", broken, "--recipe", "gptq-w4a16-g32", "--output", out),
        ("gguf", broken, "--output", out),
        ("reference", broken, "--output", out),
        ("gguf", model, "--recipe", "rtn-w4a16-g999", "--output", out),
        ("validate", broken, "--reference", broken, "--report", out),
    ):
        refused(call(*command), 2)
        assert names(tmp_path) == ["broken"], command


@pytest.mark.parametrize("out", ["", ".", "..", "/", "a" * 256, "\0x"])
def test_names_that_no_output_can_have(out: str, writer: tuple[Any, ...], tmp_path: Path) -> None:
    before = names(Path.cwd())
    refused(call(*writer, out, "--force"), 2)
    assert names(Path.cwd()) == before


def test_names_that_are_no_utf8(writer: tuple[Any, ...], model: Path) -> None:
    refused(call(*writer, "\udcff"), 2, "not valid UTF-8")
    refused(call("inspect", "\udcff"), 2, "not valid UTF-8")
    refused(call("run", model, "--prompt", "\udcff"), 2, "--prompt", "not valid UTF-8")


def test_special_files_are_not_replaced(made: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(call("gguf", made["quantized"], "--output", tmp_path / "pipe", "--force"), 2, "pipe")
    refused(call("gguf", made["quantized"], "--output", "/dev/null", "--force"), 2, "/dev/null")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("kind", "number"), [("onnx", signal.SIGKILL), ("gguf", signal.SIGHUP)])
def test_stopped_export_with_a_recipe_goes_on(
    kind: str, number: signal.Signals, deep_model: Path, tmp_path: Path
) -> None:
    few = ("--samples", "32", "--sequence-length", "128")
    command = (kind, deep_model, "--recipe", "gptq-w4a16-g32", "--output", tmp_path / "out", *few)
    process = start(*command)
    solved = tmp_path / "out.quantized.partial"
    wait_for((solved / f"{deep_model.name}.partial" / "state" / "progress.json").exists, process)
    process.send_signal(number)
    outcome = finish(process)
    if number == signal.SIGKILL:
        assert outcome.code == -signal.SIGKILL
    else:
        refused(outcome, 130, "interrupted")
    assert names(tmp_path) == ["out.quantized.partial"]
    assert (solved / MARKER).is_file()
    other = (kind, deep_model, "--recipe", "gptq-w4a16-g128", "--output", tmp_path / "out", *few)
    refused(call(*other), 2, "another recipe", "out.quantized.partial")
    outcome = call(*command)
    assert outcome.code == 0, outcome.err
    assert names(tmp_path) == ["out"]


def test_hangup_that_is_ignored_does_not_stop_a_run(made: dict[str, Path], tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("tensorrt", made["quantized"], "--output", tmp_path / "out", "--sm", "8.9")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(partial_path(tmp_path / "out").exists, process)
    process.send_signal(signal.SIGHUP)
    assert finish(process).code == 0
    assert names(tmp_path) == ["out"]


def test_state_that_no_resume_can_mend_is_removed(deep_model: Path, tmp_path: Path) -> None:
    """The last block holds no numbers: every attempt would end so."""
    broken = tmp_path / "broken"
    shutil.copytree(deep_model, broken)
    checkpoint = open_checkpoint(broken)
    tensors = {name: checkpoint.read(name).copy() for name in checkpoint.files}
    tensors["model.layers.7.mlp.down_proj.weight"][:] = float("nan")
    write_checkpoint(broken, dict(checkpoint.raw_config), tensors)
    options = ("--samples", "8", "--sequence-length", "64", "--output", tmp_path / "out")
    refused(call("quantize", broken, "--recipe", "gptq-w4a16-g32", *options), 2, "model.layers.7")
    assert names(tmp_path) == ["broken"]


PROGRESS: dict[str, bytes] = {
    "no JSON": b"{",
    "a list": b"[]",
    "nothing in it": b"{}",
    "a nest": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe",
    "a wrong identity": b'{"identity": 3, "blocks": []}',
    "wrong blocks": b'{"identity": {}, "blocks": [3]}',
    "wrong linears": b'{"identity": {}, "blocks": [{"linears": {"a": {}}, "expert_tokens": []}]}',
    "another tool's": b'{"identity": {}, "blocks": []}',
}


@pytest.mark.parametrize("damage", PROGRESS)
def test_damaged_progress_is_refused_and_kept(damage: str, model: Path, tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "out")
    (partial / "state").mkdir(parents=True)
    (partial / MARKER).touch()
    (partial / "state" / "progress.json").write_bytes(PROGRESS[damage])
    before = hashes(partial)
    command = ("quantize", model, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out")
    refused(call(*command), 2, "--no-resume")
    assert hashes(partial) == before
    assert call(*command, "--no-resume").code == 0
    assert names(tmp_path) == ["out"]
