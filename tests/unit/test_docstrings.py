"""Docstrings begin with one short line, and the modules, names and commands that they quote exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from qwen3_export import cli
from qwen3_export.cli.commands import app

ROOT = Path(cli.__file__).parents[1]
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
WORDS = 14
# Folders whose names are also those of other people's packages or of tensors and files.
AMBIGUOUS = {"onnx", "gguf", "tensorrt", "triton", "model", "qwen3_export"}
QUOTED = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"[a-z_]\w*(?:\.\w+)+")


def module_name(path: Path) -> str:
    """Dotted name below the package: `solve.blocks.fold`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}
FOLDERS = {part for name in MODULES for part in name.split(".")[:-1]}


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def defined(path: Path) -> set[str]:
    """Names that a module defines or imports, and those inside its classes."""
    found: set[str] = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).rpartition(".")[2])
    return found


def exists(name: str) -> bool:
    """Whether a dotted name is the end of a module's name, or a name in such a module."""
    if any(f".{module}".endswith(f".{name}") for module in MODULES):
        return True
    owner, _, last = name.rpartition(".")
    return any(f".{module}".endswith(f".{owner}") and last in defined(path) for module, path in MODULES.items())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_docstring_begins_with_one_short_line(path: Path) -> None:
    long = [
        f"{name}: {first!r}"
        for name, text in docstrings(FILES[path])
        if len((first := text.split("\n\n")[0]).split()) > WORDS or "\n" in first
    ]
    assert not long


def test_modules_in_backticks_exist() -> None:
    missing = [
        f"{module_name(path)}, {name}: `{quoted}`"
        for path, tree in FILES.items()
        for name, text in docstrings(tree)
        for quoted in QUOTED.findall(text)
        if DOTTED.fullmatch(quoted) and quoted.partition(".")[0] in FOLDERS - AMBIGUOUS and not exists(quoted)
    ]
    assert not missing


def test_commands_in_backticks_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    said = {
        found[1]
        for tree in FILES.values()
        for _, text in docstrings(tree)
        for quoted in QUOTED.findall(text)
        if (found := re.match(r"qwen3-export ([a-z]\w*)", quoted))
    }
    assert said <= known


def test_files_that_contributing_names_exist() -> None:
    said = QUOTED.findall((ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    paths = {quoted for quoted in said if re.fullmatch(r"[\w./-]*(/|\.py)", quoted) and "NAME" not in quoted}
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists() and not (ROOT.parent / path).exists()]


def test_a_name_that_does_not_exist_is_found() -> None:
    assert exists("solve.blocks.fold")
    assert exists("calibration.moments.Moments")
    assert not exists("solve.blocks.folds")
    assert not exists("calibration.moments.Momenta")
