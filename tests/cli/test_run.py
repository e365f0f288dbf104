"""`run`: prompts from everywhere, conversations, thoughts that are cut; and the small things of the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import call, refused

FEW = ("--max-new-tokens", "4", "--threads", "1")


def test_prompt_from_stdin_and_from_a_file_is_the_same(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Count to three.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count to three."))
    texts = {
        call("run", made["onnx"], *prompt, *FEW, "--json").json["text"]
        for prompt in (("--prompt", "Count to three."), ("--prompt", "-"), ("--prompt-file", file))
    }
    assert len(texts) == 1


@pytest.mark.parametrize("prompt", [(), ("--prompt", ""), ("--prompt", " \n"), ("--prompt", "a", "--chat")])
def test_nothing_to_say_is_refused(prompt: tuple[str, ...], made: dict[str, Path]) -> None:
    refused(call("run", made["onnx"], *prompt), 2, "hint: ")


def test_empty_inputs_are_refused(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused(call("run", made["onnx"], "--prompt", "-"), 2, "empty")
    refused(call("run", made["onnx"], "--prompt-file", tmp_path / "empty"), 2, "empty")
    refused(call("run", made["onnx"], "--prompt-file", tmp_path / "absent"), 2, "absent", "No such file")


def test_conversation_has_a_history(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a sea?\nAnd an ocean?\n\nnever asked\n"))
    turns = call("run", made["gguf"], "--chat", *FEW, "--json").json["turns"]
    assert len(turns) == 2
    alone = call("run", made["gguf"], "--prompt", "And an ocean?", *FEW, "--json").json
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] + alone["prompt_tokens"] - 20
    assert turns[1]["prompt_tokens"] > alone["prompt_tokens"]


def test_a_plan_that_cannot_run_here_is_called_by_what_ran(made: dict[str, Path], tmp_path: Path) -> None:
    """Without its GPU: the table and the report say that the plan's ONNX ran, and why."""
    artifact, reason = made["tensorrt"], "its ONNX ran in ONNX Runtime, not its plan: "
    validated = call("validate", artifact, "--reference", made["reference"], "--report", tmp_path / "report")
    timed = call("bench", artifact, "--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", "--threads", "1")
    for outcome in (validated, timed):
        assert outcome.code == 0, outcome.err
        assert reason in outcome.out
    [found] = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    assert found["runtime"] == "onnxruntime (the plan's ONNX)"
    assert "NVIDIA" in found["plan_not_run"]
    spoken = call("run", artifact, "--prompt", "hi", *FEW, "--json").json
    assert spoken["runtime"] == found["runtime"]
    aloud = call("run", artifact, "--prompt", "hi", *FEW)
    assert f"{artifact.name}: {reason}{found['plan_not_run']}\n" in aloud.err
    assert reason not in aloud.out
    assert reason not in call("run", made["onnx"], "--prompt", "hi", *FEW).err
    for command in ("validate", "bench", "run"):
        more = {"validate": ("--reference", made["reference"]), "run": ("--prompt", "hi")}.get(command, ())
        refused(call(command, artifact, *more, "--device", "plan"), 3, "NVIDIA")


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (("--no-thinking", "--thinking-budget", "5"), "--thinking-budget 5 has no effect: --no-thinking"),
        (("--top-p", "0.1", "--seed", "4"), "--top-p 0.1 and --seed 4 have no effect: without a --temperature"),
        (("--seed", "0"), "--seed 0 has no effect: without a --temperature"),
        (("--top-p", "0.1", "--seed", "4", "--temperature", "1"), None),
        (("--thinking-budget", "5"), None),
    ],
)
def test_options_without_effect_are_told(options: tuple[str, ...], warning: str | None, made: dict[str, Path]) -> None:
    said = call("run", made["onnx"], "--prompt", "Why?", *FEW, *options)
    assert said.code == 0
    told = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert len(told) == (warning is not None)
    assert all(line.startswith(f"warning: {warning}") for line in told)


BROKEN = {"{{ messages | nope }}": "No filter named 'nope'.", "{{ raise_exception('not so') }}": "not so"}


@pytest.mark.parametrize("template", BROKEN)
@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_broken_template_is_named(template: str, name: str, made: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made["onnx"], folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    text = template if name.endswith("jinja") else json.dumps({**values, "chat_template": template})
    (folder / name).write_text(text)
    outcome = call("run", folder, "--prompt", "hi", *FEW)
    refused(outcome, 2, f"{folder / name}: the chat template failed: {BROKEN[template]}", "hint: mend it", "remove it")
    # What the hint says works.
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if key != "chat_template"}))
    if name.endswith("jinja"):
        (folder / name).unlink()
    assert call("run", folder, "--prompt", "hi", *FEW).code == 0


def test_broken_template_in_a_gguf_file_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["quantized"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages | nope }}")
    assert call("gguf", tmp_path / "model", "--output", tmp_path / "model.gguf").code == 0
    words = ("GGUF file's metadata (tokenizer.chat_template): the chat template failed", "hint: mend it")
    refused(call("run", tmp_path / "model.gguf", "--prompt", "hi", *FEW), 2, *words)


def test_thinking_budget_ends_the_thought(made: dict[str, Path]) -> None:
    command = ("run", made["onnx"], "--prompt", "Why?", "--max-new-tokens", "40", "--threads", "1", "--json")
    cut = call(*command, "--thinking-budget", "3").json
    assert cut["thought_was_cut"]
    assert "</think>" in cut["text"]
    assert "limited time by the user" in cut["text"]
    assert not call(*command, "--no-thinking", "--thinking-budget", "3").json["thought_was_cut"]


def test_speed_is_told(made: dict[str, Path]) -> None:
    outcome = call("run", made["onnx"], "--prompt", "hi", *FEW)
    assert "per second, the first after" in outcome.err


def test_short_options_and_module(tmp_path: Path) -> None:
    for arguments in (("-h",), ("quantize", "-h")):
        assert "Usage: qwen3-export" in call(*arguments).out
    assert call("tasks", "-o", tmp_path / "tasks.jsonl", "--count", "3").code == 0
    outcome = subprocess.run(
        [sys.executable, "-m", "qwen3_export", "--version"], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.startswith("qwen3-export ")


def test_a_missing_file_is_called_a_file() -> None:
    refused(call("validate", "absent.gguf", "--reference", "reference-model"), 2, "absent.gguf: no such file")


def test_bits_per_weight_have_one_name(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    inspected = call("inspect", made["quantized"], "--json").json
    assert inspected["linear_bits_per_weight"] == pytest.approx(4.5)
    assert inspected["bits_per_weight"] > inspected["linear_bits_per_weight"]
    exported = json.loads((made["onnx"] / "qwen3-export.json").read_text())
    assert exported["quantized"] is not None
    for command, source, linears in (
        ("onnx", made["quantized"], 5),  # its scales are fp32
        ("gguf", made["quantized"], 4.5),
        ("gguf", model, 16),
        ("onnx", model, 16),
    ):
        found = call(command, source, "--output", tmp_path / f"{command}-{linears}.gguf", "--json").json
        assert found["linear_bits_per_weight"] == pytest.approx(linears), command
        assert found["bits_per_weight"] > linears
    rounded = call("gguf", model, "--type", "q4_k_m", "--output", tmp_path / "rounded.gguf")
    assert re.search(r"bits per weight +\d+\.\d\d in all, \d\.\d\d linears", rounded.out), rounded.out
    assert call("inspect", model, "--json").json["linear_bits_per_weight"] == 16
