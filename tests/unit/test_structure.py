"""Imports run in no circle, classes have names of their own, one file imports ray; files and functions are short."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES = 300, 40
# Modules that have a class `Options` of the same purpose: options of a method's recipe, and of a format's export.
SHARED = {"Options"}


def name_of(path: Path) -> str:
    """Dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files(*folders: str) -> list[Path]:
    """The Python files of some of the project's folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PATHS = files("qwen3_export", "benchmarks")
# Of tests and makers only the lengths are checked, not imports and names of classes.
OTHERS = files("tests", "calibration")
TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


def imported(tree: ast.AST) -> set[str]:
    """Everything that a module imports, inside functions too; not what only a type checker reads."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{item.name}" for item in node.names}
        found |= imported(node)
    return found


def modules() -> dict[str, set[str]]:
    """`{module: modules of ours that it imports}`; the package itself, which holds the version, is left out."""
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        owners = {item if item in TREES else item.rpartition(".")[0] for item in imported(tree)}
        graph[name] = {owner for owner in owners if owner in TREES and owner not in (name, "qwen3_export")}
    graph.pop("qwen3_export")
    return graph


def folders(graph: Mapping[str, set[str]], depth: int) -> dict[str, set[str]]:
    """The same between folders, which are the first `depth` parts of a module's name."""
    found: dict[str, set[str]] = {}
    for name, owners in graph.items():
        own = ".".join(name.split(".")[:depth])
        others = {".".join(owner.split(".")[:depth]) for owner in owners}
        found[own] = found.get(own, set()) | (others - {own})
    return found


def circle(graph: Mapping[str, set[str]]) -> Sequence[str]:
    """The members of one circle; none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_in_no_circle() -> None:
    assert not circle(modules())


@pytest.mark.parametrize("depth", [2, 3])
def test_folders_import_each_other_in_no_circle(depth: int) -> None:
    graph = {name: owners for name, owners in modules().items() if name.startswith("qwen3_export.")}
    found = folders(graph, depth)
    # A folder's own file stands for the folder, and may import what lies in it.
    parents = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
    assert not circle({name: owners - parents for name, owners in found.items() if name not in parents})


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_a_class_has_a_name_of_its_own() -> None:
    names = [
        node.name
        for module, tree in TREES.items()
        if module.startswith("qwen3_export")
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not {name for name, count in Counter(names).items() if count > 1} - SHARED


def test_one_file_imports_ray() -> None:
    found = {
        module
        for module, tree in TREES.items()
        if module.startswith("qwen3_export") and any(item.split(".")[0] == "ray" for item in imported(tree))
    }
    assert found == {"qwen3_export.cluster.session"}


def test_files_are_short() -> None:
    assert not [path for path in PATHS + OTHERS if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its parameters and its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    others = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in OTHERS}
    assert not [
        f"{module}: {node.name}"
        for module, tree in {**TREES, **others}.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > FUNCTION_LINES
    ]
