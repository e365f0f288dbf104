"""The README's commands, run in their order from an empty folder, and its recipe."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.helpers import call

ROOT = Path(__file__).resolve().parent.parent.parent
_BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>\w+)\n(?P<text>.*?)\n```", re.DOTALL)
_EXCUSE = re.compile(r"<!-- not run: (?P<reason>.*) -->")
_SHELL = ("console", "bash", "sh")


@dataclass(frozen=True)
class Block:
    """A fenced block of the README: its language, its lines, and why it is not run."""

    kind: str
    text: str
    excuse: str | None


def _blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        excuse = _EXCUSE.fullmatch(match["before"].strip())
        found.append(Block(match["kind"], match["text"], excuse["reason"] if excuse else None))
    return found


def _commands() -> list[str]:
    """Every command line that is shown and not excused; a console's prompt is taken off."""
    lines = []
    for block in _blocks():
        if block.kind in _SHELL and block.excuse is None:
            shown = block.text.replace("\\\n", " ").splitlines()
            if block.kind == "console":
                shown = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
            lines += [line.strip() for line in shown if line.strip() and not line.startswith("#")]
    return lines


def test_the_readme_shows_the_main_job() -> None:
    commands = _commands()
    for words in ("make demo", "make test", "qwen3-export quantize", "qwen3-export validate", "qwen3-export bench"):
        assert any(command.startswith(words) for command in commands), words


def test_every_excuse_gives_its_reason() -> None:
    for block in _blocks():
        assert block.excuse is None or len(block.excuse.split()) > 2


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # One thread each: beside other work, threads that wait for each other take many times as long.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    ran = 0
    for command in _commands():
        words = shlex.split(command)
        if words[0] == "make":
            continue
        assert words[0] == "qwen3-export", command
        outcome = call(*words[1:])
        assert outcome.code == 0, (command, outcome.err)
        assert outcome.out, command
        ran += 1
    assert ran > 5


@pytest.mark.parametrize("command", [line for line in _commands() if line.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    target = command.split()[1]
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.strip()


def test_the_recipe_shown_is_a_recipe(tmp_path: Path) -> None:
    shown = [block.text for block in _blocks() if block.kind == "yaml"]
    assert shown
    for number, text in enumerate(shown):
        recipe = tmp_path / f"recipe-{number}.yaml"
        recipe.write_text(text)
        options = ("--output", tmp_path / f"out-{number}", "--samples", "4", "--sequence-length", "128")
        outcome = call("quantize", "reference-model", "--recipe", recipe, *options)
        assert outcome.code == 0, outcome.err


def _methods() -> list[Path]:
    """Every quantization method: a file, or a folder's first file."""
    folder = ROOT / "qwen3_export/solve/methods"
    return sorted([*folder.glob("[a-z]*.py"), *folder.glob("*/__init__.py")])


@pytest.mark.parametrize("path", _methods(), ids=lambda p: p.parent.name if p.stem == "__init__" else p.stem)
def test_each_method_opens_with_the_equation_that_it_solves(path: Path) -> None:
    opening = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[:4]
    assert any("min over" in line or re.search(r"\bcode = ", line) for line in opening), opening
