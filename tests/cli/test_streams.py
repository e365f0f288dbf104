"""Results on stdout, progress on stderr; quiet, colours, help, version, and what a start must not import."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from qwen3_export import __version__
from qwen3_export.cli.commands import app
from tests.cli.conftest import SHORT
from tests.cli.helpers import COMMAND, call, finish, names, start

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HEAVY = {
    *("torch", "transformers", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "jinja2", "scipy", "pandas"),
    *("onnx", "onnx_ir", "onnxruntime", "gguf", "xllamacpp", "tensorrt_rtx", "tensorrt"),
}


def _commands() -> Iterator[tuple[str, ...]]:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from [(name, child) for child in inner] if inner else [(name,)]


@pytest.mark.parametrize("command", list(_commands()), ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    outcome = call(*command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert f"Usage: qwen3-export {' '.join(command)}" in outcome.out
    assert f"Example: qwen3-export {' '.join(command)}" in " ".join(outcome.out.split())
    for option in ("--json", "--quiet", "--verbose"):
        assert option in outcome.out


@pytest.mark.parametrize("command", list(_commands()), ids=" ".join)
def test_every_option_is_explained(command: tuple[str, ...]) -> None:
    node = typer.main.get_command(app)
    for name in command:
        node = node.commands[name]  # type: ignore[attr-defined]
    for parameter in node.params:
        assert parameter.name == "help" or getattr(parameter, "help", None), parameter.name


def test_top_level_help_lists_the_commands() -> None:
    outcome = call("--help")
    assert outcome.code == 0
    for command in _commands():
        assert f"  {command[0]} " in outcome.out


def test_version() -> None:
    outcome = call("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"qwen3-export {__version__}\n", "")


def test_start_imports_nothing_heavy() -> None:
    code = "import sys, typer.main; from qwen3_export.cli.commands import app; typer.main.get_command(app)"
    code += "; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "qwen3_export" in found
    assert _HEAVY.isdisjoint(found), _HEAVY & set(found)


def test_quiet_says_nothing_on_stderr(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    told = []
    for arguments in (
        ("quantize", model, "--recipe", "gptq-w4a16-g32", *SHORT, "--output", tmp_path / "quantized"),
        ("onnx", made["quantized"], "--output", tmp_path / "onnx"),
        ("gguf", made["quantized"], "--output", tmp_path / "gguf"),
        ("reference", model, "--output", tmp_path / "reference", "--tokens", "64"),
        ("validate", made["onnx"], "--reference", made["reference"]),
        ("bench", made["onnx"], "--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1"),
        ("run", made["onnx"], "--prompt", "hello", "--max-new-tokens", "2"),
    ):
        loud, quiet = call(*arguments, *_forced(arguments)), call(*arguments, *_forced(arguments), "--quiet")
        assert loud.code == quiet.code == 0
        told += [arguments[0]] if loud.err else []
        assert quiet.err == ""
        assert quiet.out != ""
    # What is done at once says nothing anyway.
    assert "quantize" in told


def _forced(arguments: tuple[object, ...]) -> tuple[str, ...]:
    return ("--force",) if "--output" in arguments else ()


def test_verbose_tells_the_error_of_every_linear(model: Path, tmp_path: Path) -> None:
    outcome = call("quantize", model, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out", "-v")
    lines = [line for line in outcome.err.splitlines() if line.startswith("model.layers.")]
    assert len(lines) == 14
    assert all("error" in line for line in lines)


def test_progress_names_every_part_of_the_work(made: dict[str, Path]) -> None:
    name = made["onnx"].name
    outcome = call("validate", made["onnx"], "--reference", made["reference"], "--threads", "1", "--verbose")
    places = [outcome.err.index(f"{part} {name}: done in ") for part in ("load", "validate", "texts of")]
    assert places == sorted(places)
    outcome = call("run", made["onnx"], "--prompt", "hello", "--max-new-tokens", "2", "--verbose")
    assert f"load {name}: done in " in outcome.err


@pytest.mark.parametrize("command", ["table", "error", "progress"])
def test_no_escape_sequences_without_a_terminal(command: str, made: dict[str, Path], tmp_path: Path) -> None:
    arguments = {
        "table": ("recipes", "list"),
        "error": ("inspect", tmp_path / "absent"),
        "progress": ("gguf", made["quantized"], "--output", tmp_path / "model.gguf"),
    }[command]
    outcome = finish(start(*arguments, env={"TERM": "xterm-256color", "COLORTERM": "truecolor"}))
    assert "\x1b" not in outcome.out + outcome.err
    assert "\r" not in outcome.out + outcome.err
    assert outcome.out + outcome.err != ""


def _on_a_terminal(arguments: tuple[object, ...], **env: str) -> str:
    """What a command line writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"} | env
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(pieces).decode()


def test_progress_bar_on_a_terminal_and_its_colours(made: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("gguf", made["quantized"], "--output", tmp_path / "model.gguf", "--force")
    coloured = _on_a_terminal(arguments)
    plain = _on_a_terminal(arguments, NO_COLOR="1")
    assert "export tensors" in coloured
    assert any(_is_colour(code) for code in _COLOUR.findall(coloured))
    assert "export tensors" in plain
    assert not [code for code in _COLOUR.findall(plain) if _is_colour(code)]
    assert "export tensors" not in _on_a_terminal((*arguments, "--quiet"))


def _is_colour(sequence: str) -> bool:
    numbers = [int(number or 0) for number in sequence[2:-1].split(";")]
    return any(30 <= number <= 49 or 90 <= number <= 107 for number in numbers)


def test_table_keeps_its_columns_in_a_narrow_log(made: dict[str, Path]) -> None:
    outcome = finish(start("recipes", "list", env={"TERM": "dumb"}))
    assert all(len(line.split()) > 2 for line in outcome.out.splitlines()[3:] if line.strip()), outcome.out
    assert "…" not in outcome.out


def test_result_survives_a_failing_gate(made: dict[str, Path]) -> None:
    common = ("validate", made["onnx"], "--reference", made["reference"], "--max-kl", "0")
    outcome = call(*common)
    assert outcome.code == 1
    assert "FAIL" in outcome.out
    assert "max_kl is" in outcome.out
    assert "error" not in outcome.err
    values = json.loads(call(*common, "--json").out)
    assert values["passed"] is False


def test_relative_paths_work_from_anywhere(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = finish(start("onnx", os.path.relpath(made["quantized"], tmp_path), "--output", "out", cwd=tmp_path))
    assert outcome.code == 0
    assert names(tmp_path) == ["out"]
