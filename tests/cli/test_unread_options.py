"""Calibration options that a recipe does not read: a named file must be there, the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SHORT
from tests.cli.helpers import call, hashes, names, refused

RTN, GPTQ = ("--recipe", "rtn-w4a16-g32"), ("--recipe", "gptq-w4a16-g32")
COMMANDS = ("quantize", "plan", "onnx", "gguf", "tensorrt")


def _command(name: str, model: Path, out: Path) -> tuple[object, ...]:
    more: dict[str, tuple[object, ...]] = {"plan": ("--no-time",), "tensorrt": ("--onnx-only", "--output", out)}
    return (name, model, *RTN, *more.get(name, ("--output", out)))


@pytest.mark.parametrize("command", COMMANDS)
def test_file_that_is_not_read_must_be_there(command: str, model: Path, tmp_path: Path) -> None:
    line = _command(command, model, tmp_path / "out")
    for name in ("absent.txt", "notes=absent.jsonl", "absent", "text.csv"):
        outcome = call(*line, "--calibration", name)
        assert outcome.code == 2, outcome.err
        assert name.removeprefix("notes=") in outcome.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_are_not_read_are_told(command: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("never read")
    options = ("--calibration", text, "--samples", "4")
    outcome = call(*_command(command, model, tmp_path / "out"), *options)
    assert outcome.code == 0, outcome.err
    warning = f"--calibration {text} and --samples 4 have no effect: rtn-w4a16-g32 reads no calibration text"
    assert outcome.err.count(f"warning: {warning}\n") == 1


def test_bytes_are_the_same_without_them(model: Path, tmp_path: Path) -> None:
    more = ("--sequence-length", "32", "--scratch", tmp_path / "scratch")
    plain = call("quantize", model, *RTN, "--output", tmp_path / "plain")
    told = call("quantize", model, *RTN, "--output", tmp_path / "told", *more)
    assert plain.code == told.code == 0
    assert "no effect" not in plain.err
    assert f"--sequence-length 32 and --scratch {tmp_path / 'scratch'} have no effect" in told.err
    tensors = [{k: v for k, v in hashes(tmp_path / name).items() if "safetensors" in k} for name in ("plain", "told")]
    assert tensors[0] == tensors[1]
    assert tensors[0]


def test_options_that_are_read_are_not_told(model: Path, tmp_path: Path) -> None:
    outcome = call("quantize", model, *GPTQ, *SHORT, "--output", tmp_path / "out")
    assert outcome.code == 0
    assert "no effect" not in outcome.err


@pytest.mark.parametrize(
    "option", ["--text=absent.txt", "--tokens=64", "--window=64", "--top-k=8", "--thinking-budget=4", "--tasks=absent"]
)
def test_merging_measures_nothing(option: str, made: dict[str, Path], tmp_path: Path) -> None:
    merge = ("reference", made["reference"], "--merge", made["reference"], "--output", tmp_path / "out")
    refused(call(*merge, option), 2, option.partition("=")[0], "hint: leave it away")
    assert names(tmp_path) == []


def test_sizes_of_groups_beside_ggml_types(model: Path, tmp_path: Path) -> None:
    search = ("recipes", "search", model, "--grids", "gguf", "--target-bpw", "1", "--output", tmp_path / "out.yaml")
    outcome = call(*search, "--groups", "32")
    assert "warning: --groups 32 has no effect: ggml's types have blocks of their own\n" in outcome.err
    assert "no effect" not in call(*search).err
