"""Where outputs go: never over something that is not ours, never half there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen3_export
from qwen3_export.errors import InputError
from tests.cli.helpers import call, fill, hashes, names, refused

WRITERS: dict[str, Callable[[dict[str, Path], Path], tuple[Any, ...]]] = {
    "quantize": lambda made, model: ("quantize", model, "--recipe", "rtn-w4a16-g32"),
    "onnx": lambda made, model: ("onnx", made["quantized"]),
    "onnx with a recipe": lambda made, model: ("onnx", model, "--recipe", "rtn-w4a16-g32"),
    "gguf": lambda made, model: ("gguf", made["quantized"]),
    "tensorrt": lambda made, model: ("tensorrt", made["quantized"], "--sm", "8.9"),
    "reference": lambda made, model: ("reference", model, "--tokens", "64"),
}
FILES = ("gguf", "reference")


FILE_WRITERS: dict[str, Callable[[dict[str, Path], Path], tuple[Any, ...]]] = {
    **{kind: WRITERS[kind] for kind in FILES},
    "calibrate": lambda made, model: ("calibrate", model, "--samples", "2", "--sequence-length", "32"),
    "search": lambda made, model: ("recipes", "search", model, "--target-bpw", "5"),
    "tasks": lambda made, model: ("tasks",),
    "merge": lambda made, model: ("reference", made["reference"], "--merge", made["reference"]),
}


@pytest.mark.parametrize("kind", FILE_WRITERS)
@pytest.mark.parametrize("option", [["-o", "{}"], ["--output={}"]], ids=str)
def test_file_is_no_folder(kind: str, option: list[str], made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "out.gguf"
    line = FILE_WRITERS[kind](made, model)
    outcome = call(*line, *(word.format(f"{wanted}/") for word in option))
    refused(outcome, 2, f"{wanted}/ names a folder, a file was expected", f"hint: {wanted}, or a file in it")
    assert names(tmp_path) == []


def test_folder_may_have_a_slash(made: dict[str, Path], tmp_path: Path) -> None:
    assert call("onnx", made["quantized"], "--output", f"{tmp_path}/out/").code == 0
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [*WRITERS, *FILE_WRITERS])
def test_stdout_is_no_output(
    kind: str, made: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-", "./-"):
        outcome = call(*{**WRITERS, **FILE_WRITERS}[kind](made, model), "-o", name)
        refused(outcome, 2, "cannot go to stdout", "hint: name a file or folder")
    assert names(tmp_path) == []


def test_python_writes_no_file_in_place_of_a_folder(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out/ names a folder"):
        qwen3_export.export(made["quantized"], f"{tmp_path}/out/", "gguf")
    assert names(tmp_path) == []


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, made: dict[str, Path], model: Path) -> tuple[str, tuple[Any, ...]]:
    return request.param, WRITERS[request.param](made, model)


def test_output_that_exists_is_kept(writer: tuple[str, tuple[Any, ...]], tmp_path: Path) -> None:
    kind, command = writer
    out = tmp_path / "out"
    assert call(*command, "--output", out).code == 0
    before = hashes(out)
    refused(call(*command, "--output", out), 2, "out exists already", "--force")
    assert hashes(out) == before
    assert call(*command, "--output", out, "--force").code == 0
    assert (out.is_file()) == (kind in FILES)
    assert names(tmp_path) == ["out"]


def test_foreign_folder_is_never_replaced(writer: tuple[str, tuple[Any, ...]], tmp_path: Path) -> None:
    _, command = writer
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for force in ((), ("--force",)):
        refused(call(*command, "--output", out, *force), 2, "out")
        assert names(tmp_path) == ["out"]
        assert (out / "thesis.txt").read_text() == "precious"


def test_folder_does_not_take_the_place_of_a_file(writer: tuple[str, tuple[Any, ...]], tmp_path: Path) -> None:
    kind, command = writer
    if kind in FILES:
        refused(call(*command, "--output", tmp_path, "--force"), 2, "is a folder, a file was expected")
        assert names(tmp_path) == []
        return
    out = tmp_path / "thesis.txt"
    out.write_text("precious")
    refused(call(*command, "--output", out, "--force"), 2, "is a file, a folder was expected")
    assert out.read_text() == "precious"
    assert names(tmp_path) == ["thesis.txt"]


def test_link_is_replaced_and_not_followed(made: dict[str, Path], tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    assert call("onnx", made["quantized"], "--output", target).code == 0
    out.symlink_to(target)
    before = hashes(target)
    refused(call("onnx", made["quantized"], "--output", out), 2, "exists already")
    assert call("onnx", made["quantized"], "--output", out, "--force").code == 0
    assert not out.is_symlink()
    assert hashes(out) == before == hashes(target)
    assert names(tmp_path) == ["out", "target"]


def test_empty_folder_may_be_replaced_by_force(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    refused(call("onnx", made["quantized"], "--output", out), 2, "exists already")
    assert call("onnx", made["quantized"], "--output", out, "--force").code == 0
    assert names(tmp_path) == ["out"]


def test_parent_that_is_a_file(writer: tuple[str, tuple[Any, ...]], tmp_path: Path) -> None:
    _, command = writer
    (tmp_path / "file").write_text("")
    refused(call(*command, "--output", tmp_path / "file" / "out"), 2, "file")
    assert names(tmp_path) == ["file"]


def test_place_that_takes_no_files(writer: tuple[str, tuple[Any, ...]]) -> None:
    _, command = writer
    outcome = call(*command, "--output", "/proc/qwen3-export-out")
    refused(outcome, 2, "/proc/qwen3-export-out cannot be written", "hint: choose another place")


def test_missing_parents_are_made(made: dict[str, Path], tmp_path: Path) -> None:
    assert call("onnx", made["quantized"], "--output", tmp_path / "a" / "b" / "onnx").code == 0
    assert call("gguf", made["quantized"], "--output", tmp_path / "c" / "model.gguf").code == 0
    assert names(tmp_path / "a" / "b") == ["onnx"]
    assert names(tmp_path / "c") == ["model.gguf"]


def test_report_that_exists_is_refused_before_the_work(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "thesis.txt").write_text("precious")
    monkeypatch.setattr("qwen3_export.prove.validate.validate", None)
    monkeypatch.setattr("qwen3_export.prove.latency.bench", None)
    for force in ((), ("--force",)):
        common = ("--report", report, *force)
        refused(call("validate", made["onnx"], "--reference", made["reference"], *common), 2, "report")
        refused(call("bench", made["onnx"], *common), 2, "report")
    assert names(report) == ["thesis.txt"]


def test_recipe_on_the_way_leaves_no_folder_behind(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "rtn-w4a16-g32")
    steps = tmp_path / model.name
    assert call("quantize", model, *recipe, "--output", steps).code == 0
    for command, weights in (("onnx", "model.onnx.data"), ("gguf", "."), ("tensorrt", "model.onnx.data")):
        there, here = tmp_path / f"{command}-steps", tmp_path / f"{command}-way"
        assert call(command, steps, "--output", there).code == 0
        outcome = call(command, model, *recipe, "--output", here, "--json")
        assert outcome.json["output"] == str(here)
        assert hashes(here)[weights] == hashes(there)[weights]
        refused(call(command, model, *recipe, "--output", here), 2, "exists already")
        refused(call(command, model, "--recipe", "absent", "--output", tmp_path / "no"), 2, "absent")
    exports = ["gguf-steps", "gguf-way", "onnx-steps", "onnx-way", "tensorrt-steps", "tensorrt-way"]
    assert names(tmp_path) == [*exports, model.name]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("quantize", (64, 1024)),
        ("onnx", (64, 1024, 2600)),
        ("onnx with a recipe", (64, 1024, 3000, 4400)),
        ("gguf", (64, 1024, 2400)),
        ("tensorrt", (64, 1024, 3000, 6000)),
        ("reference", (4, 16)),
    ],
)
def test_full_disk(
    kind: str, sizes: tuple[int, ...], made: dict[str, Path], model: Path, disk: Callable[..., Path]
) -> None:
    for kibibytes in sizes:
        place = disk(kibibytes << 10)
        outcome = call(*WRITERS[kind](made, model), "--output", place / "out")
        refused(outcome, 4, "hint: ")
        kept = names(place)
        if kind == "onnx with a recipe" and kept:
            # It was quantized before the disk was full: the same command goes on from there.
            assert kept == ["out.quantized.partial"]
            assert (place / kept[0] / model.name / "qwen3-export.json").is_file()
        else:
            assert kept == [], kibibytes


def test_full_disk_under_a_report(made: dict[str, Path], disk: Callable[..., Path]) -> None:
    place = disk(64 << 10)
    fill(place / "filler")
    outcome = call("validate", made["onnx"], "--reference", made["reference"], "--report", place / "report")
    refused(outcome, 4, "disk is full")
    assert names(place) == ["filler"]


def test_disk_that_cannot_be_written(made: dict[str, Path], disk: Callable[..., Path]) -> None:
    place = disk(1 << 20, "ro")
    refused(call("onnx", made["quantized"], "--output", place / "out"), 2, "Read-only", str(place))
    refused(call("gguf", made["quantized"], "--output", place / "out"), 2, "Read-only", str(place))


def test_report_in_place_of_a_file_names_no_option_that_is_not_there(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.write_text("precious")
    asked = ("validate", model, "--reference", model, "--report", report)
    outcome = call(*asked)
    refused(outcome, 2, "is a file, a folder was expected", "choose another place")
    assert "--output" not in outcome.err
    assert report.read_text() == "precious"


@pytest.mark.parametrize("command", ["validate", "bench"])
def test_what_is_no_artifact_is_refused_before_the_others_run(command: str, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    truth = ("--reference", model) if command == "validate" else ()
    outcome = call(command, model, empty, *truth)
    refused(outcome, 2, "empty.gguf: neither a GGUF file")
    assert "done in" not in outcome.err
