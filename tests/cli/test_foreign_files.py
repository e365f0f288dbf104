"""Files that a command may not harm, wait for, or copy without end: inputs, others' files, pipes, devices."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

import qwen3_export
from qwen3_export.core.imatrix import read_imatrix
from qwen3_export.core.model_card import CARD
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf import Options
from tests.cli.helpers import call, hashes, names, refused

SHORT = ("--samples", "2", "--sequence-length", "32")


def test_a_report_from_python_never_replaces_an_input(made: dict[str, Path], tmp_path: Path) -> None:
    artifact, text = tmp_path / "artifact", tmp_path / "artifact" / "text.txt"
    shutil.copytree(made["onnx"], artifact)
    text.write_text("one two three four five six " * 50)
    before = hashes(artifact)
    with pytest.raises(InputError, match="is the input"):
        qwen3_export.validate([artifact], made["reference"], report=artifact, force=True)
    with pytest.raises(InputError, match="is the input"):
        qwen3_export.bench([artifact], report=artifact, force=True)
    with pytest.raises(InputError, match=r"is around the input|holds text\.txt"):
        qwen3_export.bench([made["onnx"]], texts=[f"words={text}"], report=artifact, force=True)
    outcome = call("bench", made["onnx"], "--text", f"words={text}", "--report", artifact, "--force")
    refused(outcome, 2, "text.txt")
    assert hashes(artifact) == before


def test_an_export_from_python_never_replaces_its_importance_matrix(model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.gguf"
    assert call("calibrate", model, *SHORT, "--output", matrix).code == 0
    before = hashes(tmp_path)
    options = Options(importance=read_imatrix(matrix))
    with pytest.raises(InputError, match="is the input"):
        qwen3_export.export(model, matrix, "gguf", type_name="q4_k_m", options=options, force=True)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_the_name_that_replacing_needs_is_somebody_elses(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["onnx"], tmp_path / "out")
    other = tmp_path / ".out.replaced"
    (tmp_path / "precious").mkdir()
    if kind == "file":
        other.write_text("years of work")
    elif kind == "folder":
        other.mkdir()
        (other / "thesis.txt").write_text("years of work")
    else:
        other.symlink_to("precious")
    before = hashes(tmp_path)
    refused(call("onnx", made["quantized"], "--output", tmp_path / "out", "--force"), 2, ".out.replaced")
    assert hashes(tmp_path) == before
    assert names(tmp_path) == sorted([".out.replaced", "out", "precious"])


def test_a_card_is_not_written_through_a_link(made: dict[str, Path], tmp_path: Path) -> None:
    artifact, precious = tmp_path / "artifact", tmp_path / "thesis.txt"
    shutil.copytree(made["onnx"], artifact)
    precious.write_text("years of work")
    (artifact / f".{CARD}.new").symlink_to(precious)
    outcome = call("validate", artifact, "--reference", made["reference"], "--threads", "1", "--card")
    assert outcome.code == 0, outcome.err
    assert precious.read_text() == "years of work"
    assert "Nothing yet" not in (artifact / CARD).read_text()
    assert {name for name in names(artifact) if name.endswith(".new")} == {f".{CARD}.new"}


def test_a_card_that_cannot_be_written_is_a_warning(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_names: object) -> None:
        raise PermissionError(13, "Permission denied")

    artifact = tmp_path / "artifact"
    shutil.copytree(made["onnx"], artifact)
    monkeypatch.setattr("qwen3_export.core.model_card.os.replace", closed)
    before = hashes(artifact)
    outcome = call("validate", artifact, "--reference", made["reference"], "--threads", "1", "--card")
    assert outcome.code == 0, outcome.err
    assert "the figures cannot be put in (Permission denied)" in outcome.err
    assert "onnxruntime" in outcome.out
    assert hashes(artifact) == before


def test_a_card_that_cannot_be_read_is_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(made["onnx"], artifact)
    (artifact / CARD).write_bytes(b"caf\xe9")
    outcome = call("validate", artifact, "--reference", made["reference"], "--threads", "1", "--card")
    assert outcome.code == 0, outcome.err
    assert "warning: " in outcome.err
    assert CARD in outcome.err
    assert "onnxruntime" in outcome.out
    assert (artifact / CARD).read_bytes() == b"caf\xe9"


@pytest.mark.parametrize("place", ["nowhere/summary.md", ".", "pipe"])
def test_a_summary_that_cannot_be_written_is_a_warning(
    place: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / place))
    outcome = call("validate", made["onnx"], "--reference", made["reference"], "--threads", "1")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("warning: GITHUB_STEP_SUMMARY: ") == 1
    assert "onnxruntime" in outcome.out


def test_an_importance_matrix_that_is_no_file(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, word in (("pipe", "a pipe"), ("zero", "a device")):
        command = ("gguf", model, "--type", "q4_k_m", "--imatrix", tmp_path / name)
        refused(call(*command, "--output", tmp_path / "out"), 2, word)


def _matrix(path: Path, key: str, value: object, kind: gguf.GGUFValueType, shape: tuple[int, ...] = (1, 64)) -> Path:
    writer = gguf.GGUFWriter(None, "imatrix")
    writer.add_key_value("general.type", "imatrix", gguf.GGUFValueType.STRING)
    writer.add_key_value(key, value, kind)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones(shape, np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_with_values_of_other_types(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    sound = _matrix(tmp_path / "sound.gguf", "imatrix.chunk_count", 3, kinds.UINT32)
    assert call("inspect", sound).code == 0
    for key, value, kind in (
        ("imatrix.chunk_count", "many", kinds.STRING),
        ("imatrix.chunk_size", [1, 2], kinds.ARRAY),
        ("imatrix.chunk_size", float("nan"), kinds.FLOAT64),
        ("general.alignment", [1, 2], kinds.ARRAY),
        ("general.alignment", -1, kinds.INT64),
    ):
        refused(call("inspect", _matrix(tmp_path / "odd.gguf", key, value, kind)), 2, key)
    refused(call("inspect", _matrix(tmp_path / "odd.gguf", "x", 1, kinds.UINT32, (1, 0))), 2, "no values in it")


def test_calibrate_has_bounds(model: Path, tmp_path: Path) -> None:
    for option in ("--samples", "--sequence-length", "--seed"):
        refused(call("calibrate", model, option, "9" * 30, "--output", tmp_path / "out"), 2, option)


@pytest.mark.parametrize("what", ["device", "pipe", "loop"])
def test_triton_copies_regular_files_alone(what: str, made: dict[str, Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(made["onnx"], artifact)
    if what == "device":
        (artifact / "extra").symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(artifact / "extra")
    else:
        (artifact / "extra").symlink_to("..")
    refused(call("triton", artifact, "--output", tmp_path / "out"), 2, "extra")
    assert names(tmp_path) == ["artifact"]


def test_an_older_importance_matrix_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(struct.pack("<iii", 1, 2**31 - 1, 0))
    refused(call("inspect", path), 2)
