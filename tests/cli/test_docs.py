"""The commands, recipes and Python of README and guides: each page runs in its order from an empty folder."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.helpers import call

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?P<before>[^\n]*)\n(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)\n *```", re.DOTALL)
_EXCUSE = re.compile(r"<!-- not run: (?P<reason>.*) -->")
_SHELL = ("console", "bash", "sh")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its lines, and why it is not run."""

    kind: str
    text: str
    excuse: str | None


def _blocks(page: Path) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        excuse = _EXCUSE.fullmatch(match["before"].strip())
        text = re.sub(f"(?m)^{match['indent']}", "", match["text"])
        found.append(Block(match["kind"], text, excuse["reason"] if excuse else None))
    return found


def _lines(block: Block) -> list[str]:
    """Every command line of a block; a console's prompt is taken off."""
    shown = block.text.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        shown = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    return [line.strip() for line in shown if line.strip() and not line.startswith("#")]


def _commands(page: Path) -> Iterator[str]:
    for block in _blocks(page):
        if block.kind in _SHELL and block.excuse is None:
            yield from _lines(block)


def _with(pages: list[Path], kinds: tuple[str, ...]) -> list[Path]:
    """The pages that show something of these kinds that is run."""
    return [page for page in pages if any(b.kind in kinds and b.excuse is None for b in _blocks(page))]


def test_the_readme_shows_the_main_job() -> None:
    commands = list(_commands(ROOT / "README.md"))
    for words in ("make demo", "make test", "qwen3-export quantize", "qwen3-export validate"):
        assert any(command.startswith(words) for command in commands), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_excuse_gives_its_reason(page: Path) -> None:
    for block in _blocks(page):
        assert block.excuse is None or len(block.excuse.split()) > 2


@pytest.mark.parametrize("page", _with(PAGES, (*_SHELL, "python")), ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # One thread each: beside other work, threads that wait for each other take many times as long.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    for block in (block for block in _blocks(page) if block.excuse is None):
        if block.kind == "python":
            exec(compile(block.text, str(page), "exec"), {})
        for command in _lines(block) if block.kind in _SHELL else ():
            words = shlex.split(command)
            if words[0] in ("make", "pip"):
                continue
            assert words[0] == "qwen3-export", command
            outcome = call(*words[1:])
            assert outcome.code == 0, (command, outcome.err)
            assert outcome.out or ">" in command, command


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_every_make_target_exists(page: Path) -> None:
    for command in (line for line in _commands(page) if line.startswith("make ")):
        for target in command.split("#")[0].split()[1:]:
            plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
            assert plan.returncode == 0, (command, plan.stderr)
            assert plan.stdout.strip(), command


@pytest.mark.parametrize("page", _with(PAGES, ("yaml",)), ids=lambda page: page.stem)
def test_the_recipe_shown_is_a_recipe(page: Path, tmp_path: Path) -> None:
    shown = [block.text for block in _blocks(page) if block.kind == "yaml" and block.text.startswith("name:")]
    for number, text in enumerate(shown):
        recipe = tmp_path / f"recipe-{number}.yaml"
        recipe.write_text(text)
        options = ("--output", tmp_path / f"out-{number}", "--samples", "4", "--sequence-length", "128")
        outcome = call("quantize", "reference-model", "--recipe", recipe, *options)
        assert outcome.code == 0, outcome.err


def _outputs(page: Path) -> Iterator[str]:
    """What the commands and the Python of a page write."""
    for command in _commands(page):
        words = shlex.split(command)
        for before, word in pairwise(words):
            if before in ("--output", "-o", "--report"):
                yield word.rstrip("/")
        if words[:3] == ["qwen3-export", "recipes", "search"] and "--output" not in words:
            yield f"{words[3]}-mixed-{words[words.index('--target-bpw') + 1]}bpw.yaml"
    for block in (block for block in _blocks(page) if block.kind == "python" and block.excuse is None):
        for node in ast.walk(ast.parse(block.text)):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if isinstance(node, ast.Call) and name in ("quantize", "export"):
                place = node.args[2 if name == "quantize" else 1]
                assert isinstance(place, ast.Constant), ast.dump(place)
                yield str(place.value)


def test_all_guides_can_be_walked_through_in_one_folder() -> None:
    """Each page runs alone, as tested above; together they do when no two outputs have one name."""
    written = {page.name: list(_outputs(page)) for page in PAGES}
    assert {"quantized", "report", "rounded", "rounded.gguf"} <= set(written["README.md"])
    assert "reference-model-mixed-4.5bpw.yaml" in written["mixed-precision.md"]
    names = [name for outputs in written.values() for name in outputs]
    assert sorted(names) == sorted(set(names)), [name for name in set(names) if names.count(name) > 1]
    assert len({name.split("/")[0] for name in names}) == len(names)


def test_every_link_between_pages_holds() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def _methods() -> list[Path]:
    """Every quantization method: a file, or a folder's first file."""
    folder = ROOT / "qwen3_export/solve/methods"
    return sorted([*folder.glob("[a-z]*.py"), *folder.glob("*/__init__.py")])


@pytest.mark.parametrize("path", _methods(), ids=lambda p: p.parent.name if p.stem == "__init__" else p.stem)
def test_each_method_opens_with_the_equation_that_it_solves(path: Path) -> None:
    opening = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[:4]
    assert any("min over" in line or re.search(r"\bcode = ", line) for line in opening), opening
