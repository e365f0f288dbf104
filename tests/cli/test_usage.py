"""Wrong command lines and missing things: the documented exit code in our one-line form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.helpers import Outcome, call, finish, names, refused, start

WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown command": (("quantise", "x"), ("quantise",)),
    "unknown option": (("inspect", "reference-model", "--bogus"), ("--bogus",)),
    "missing argument": (("inspect",), ("source",)),
    "missing option": (("quantize", "reference-model", "--recipe", "rtn-w4a16-g32"), ("--output",)),
    "missing value": (("gguf", "reference-model", "--output"), ("--output",)),
    "samples no number": (("quantize", "m", "--recipe", "r", "--output", "o", "--samples", "x"), ("--samples",)),
    "samples 0": (("quantize", "m", "--recipe", "r", "--output", "o", "--samples", "0"), ("--samples",)),
    "threads 0": (("bench", "m", "--threads", "0"), ("--threads",)),
    "unknown recipes command": (("recipes", "lst"), ("lst",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_line(case: str) -> None:
    arguments, words = WRONG[case]
    refused(call(*arguments), 2, *words)


# Options of `quantize` with values that only the command itself can judge.
OPTIONS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "memory no size": (("--memory", "lots"), 2, ("--memory lots", "8GiB")),
    "memory too small": (("--memory", "64MiB"), 2, ("about ", "--memory allows 64 MiB")),
    "unknown device": (("--device", "tpu"), 2, ("--device tpu", "cpu or cuda")),
    "longer than the model": (("--sequence-length", "513"), 2, ("513", "512")),
    "unknown layout": (("--layout", "nobody"), 2, ("nobody", "gptq")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_quantize_option(case: str, model: Path, tmp_path: Path) -> None:
    options, code, words = OPTIONS[case]
    outcome = call("quantize", model, "--recipe", "gptq-w4a16-g32", "--output", tmp_path / "out", *options)
    refused(outcome, code, *words)
    assert names(tmp_path) == []


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["numba"] = None
from qwen3_export.cli import main
main()
"""


@pytest.mark.parametrize("command", ["quantize", "plan", "calibrate", "onnx"])
def test_unknown_device_is_refused_before_torch_is_there(command: str, model: Path, tmp_path: Path) -> None:
    recipe = () if command == "calibrate" else ("--recipe", "gptq-w4a16-g32")
    output = () if command == "plan" else ("--output", str(tmp_path / "out"))
    arguments = [command, str(model), *recipe, *output, "--device", "gpu"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )
    refused(Outcome(done.returncode, done.stdout, done.stderr), 2, "--device gpu: cpu or cuda was expected", "hint: ")
    assert names(tmp_path) == []


def test_cuda_without_cuda(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = ("--recipe", "rtn-w4a16-g32", "--device", "cuda")
    refused(call("quantize", model, *recipe, "--output", tmp_path / "out"), 3, "--device cuda", "hint: ")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("onnx", "--flavor", "other"),
        ("onnx", "--precision", "fp8"),
        ("gguf", "--type", "q5_k"),
        ("tensorrt", "--engine", "other"),
        ("tensorrt", "--sm", "9.9"),
        ("tensorrt", "--precision", "fp32"),
    ],
)
def test_wrong_export_option(command: str, option: str, value: str, made: dict[str, Path], tmp_path: Path) -> None:
    refused(call(command, made["quantized"], option, value, "--output", tmp_path / "out"), 2, option, value)
    assert names(tmp_path) == []


def test_type_that_the_codes_do_not_have(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("gguf", made["quantized"], "--type", "q8_0", "--output", tmp_path / "out")
    refused(outcome, 2, "q8_0", "q4_0")
    assert names(tmp_path) == []


def test_engine_that_is_not_installed(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("tensorrt", made["quantized"], "--engine", "trt", "--output", tmp_path / "out")
    refused(outcome, 3, "tensorrt", "hint: pip install tensorrt")
    assert names(tmp_path) == []


@pytest.mark.parametrize("counts", ["x", "0", "128,", "-1"])
def test_wrong_prompt_tokens(counts: str, made: dict[str, Path]) -> None:
    refused(call("bench", made["onnx"], f"--prompt-tokens={counts}"), 2, "--prompt-tokens")


def test_hub_id_without_a_hub(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty-cache")}
    refused(finish(start("inspect", "Qwen/Qwen3-0.6B", env=offline)), 3, "Qwen/Qwen3-0.6B", "hint: ")
    command = ("quantize", "Qwen/Qwen3-0.6B", "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out")
    refused(finish(start(*command, env=offline)), 3, "Qwen/Qwen3-0.6B")
    assert "out" not in names(tmp_path)


@pytest.mark.parametrize("source", ["absent", "./absent", "/absent/model", "~nobody/model", "a/b--c", "out/model.gguf"])
def test_source_that_is_not_there(source: str, made: dict[str, Path]) -> None:
    refused(call("inspect", source), 2, source)
    refused(call("validate", source, "--reference", made["reference"]), 2, source)
    refused(call("bench", source), 2, source)


def test_wrong_kind_of_artifact(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    folder, text = tmp_path / "folder", tmp_path / "text.gguf"
    folder.mkdir()
    text.write_text("hello")
    for artifact in (folder, text, made["reference"]):
        refused(call("run", artifact, "--prompt", "hi"), 2, artifact.name)
        refused(call("validate", artifact, "--reference", made["reference"]), 2, artifact.name)
        refused(call("bench", artifact), 2, artifact.name)
    refused(call("inspect", text), 2, text.name)
    refused(call("validate", made["onnx"], "--reference", made["gguf"]), 2, "model.gguf", "an artifact", "the original")
    graph = made["onnx"] / "model.onnx"
    refused(call("validate", made["onnx"], "--reference", graph), 2, "model.onnx", "an artifact", "the original")
    refused(call("gguf", made["gguf"], "--output", tmp_path / "out"), 2, "model.gguf", "no source", "the checkpoint")
    weights = model / "model.safetensors"
    refused(call("validate", made["onnx"], "--reference", weights), 2, "not a reference file")


def test_broken_artifacts(made: dict[str, Path], tmp_path: Path) -> None:
    gguf, onnx = tmp_path / "short.gguf", tmp_path / "onnx"
    gguf.write_bytes(made["gguf"].read_bytes()[:100_000])
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"no protobuf")
    for artifact in (gguf, onnx):
        refused(call("run", artifact, "--prompt", "hi"), 2, artifact.name)
        refused(call("bench", artifact), 2, artifact.name)


def test_texts_that_do_not_fit(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    for artifact in (model, made["onnx"], made["gguf"]):
        refused(call("run", artifact, "--prompt", "word " * 1000), 2, "512")
        refused(call("bench", artifact, "--prompt-tokens", "512", "--new-tokens", "1"), 2, "512", "513")
    refused(call("reference", model, "--window", "513", "--output", tmp_path / "out"), 2, "--window 513", "512")
    assert names(tmp_path) == []


def test_reference_of_another_model(made: dict[str, Path], tmp_path: Path) -> None:
    from tests.conftest import tiny_config, write_checkpoint

    other = write_checkpoint(tmp_path / "other", tiny_config(vocab_size=300))
    refused(call("validate", other, "--reference", made["reference"]), 2, "300", "8192")


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "mapping"), ("max_kl: x", "max_kl"), ("max_lk: 1", "max_lk"), ("{", "gate.yaml"), ("[" * 5000, "gate.yaml")],
)
def test_malformed_gate(text: str, word: str, made: dict[str, Path], tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text(text)
    refused(call("validate", made["onnx"], "--reference", made["reference"], "--gate", gate), 2, word)


def test_reference_file_brings_its_own_text(made: dict[str, Path]) -> None:
    common: tuple[Any, ...] = ("validate", made["onnx"], "--reference", made["reference"])
    refused(call(*common, "--text", "some.txt"), 2, "its own text")
    refused(call(*common, "--tokens", "100"), 2, "its own text")


def test_traceback_only_when_asked_for(tmp_path: Path) -> None:
    source = str(tmp_path / "absent")
    assert "Traceback" not in call("inspect", source).err
    verbose = call("inspect", source, "--verbose")
    assert "Traceback" in verbose.err
    assert verbose.err.splitlines()[-2].startswith("error: ")
    assert verbose.code == 2


def test_unexpected_failure_is_one_line_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_spec: str) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("qwen3_export.cli.solve.open_source", broken)
    outcome = call("inspect", model)
    assert outcome.code not in (0, 1)
    assert outcome.err.splitlines()[0] == "error: unexpected ZeroDivisionError: one"
    assert "Traceback" not in outcome.err


def test_bare_command_shows_the_help_and_ends_with_an_error() -> None:
    for arguments in ((), ("recipes",)):
        outcome = call(*arguments)
        assert outcome.err.startswith(f"Usage: {' '.join(('qwen3-export', *arguments))} [OPTIONS] COMMAND")
        refused(outcome, 2, "error: Missing command.\nhint: ")


def test_process_ends_with_the_same_code(tmp_path: Path) -> None:
    outcome = finish(start("inspect", tmp_path / "absent", env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")}))
    refused(outcome, 2, "absent")


@pytest.mark.parametrize("command", ["validate", "reference"])
def test_help_says_that_tokens_are_whole_rows(command: str, model: Path, tmp_path: Path) -> None:
    """The least that may be asked for gives a row of more tokens."""
    said = " ".join(call(command, "--help").out.split())
    assert "in whole rows of up to 256 tokens: at least one row" in said
    written = call("reference", model, "--tokens", "64", "--output", tmp_path / "out", "--json").json
    assert written["rows"] == 1
    assert 64 < written["positions"] < 256
