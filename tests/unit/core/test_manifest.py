"""Outputs appear whole or not at all, replace only what is ours, and are written by one run at a time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qwen3_export.core.manifest import (
    MANIFEST,
    file_list,
    read_manifest,
    sha256_file,
    sha256_text,
    write_manifest,
)
from qwen3_export.core.outputs import staged_file, staged_folder, write_atomic
from qwen3_export.errors import InputError

Staged = Callable[..., AbstractContextManager[Path]]
both = pytest.mark.parametrize("staged", [staged_folder, staged_file])


def fill(staged: Staged, partial: Path, text: str = "new") -> None:
    (partial / "data.txt" if staged is staged_folder else partial).write_text(text)


def fill_and_raise(staged: Staged, block: AbstractContextManager[Path], error: type[BaseException]) -> None:
    with block as partial:
        fill(staged, partial)
        raise error("stop")


def content(output: Path) -> str:
    return (output / "data.txt" if output.is_dir() else output).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@both
def test_an_output_appears_when_the_block_ends_and_not_before(staged: Staged, tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as partial:
        fill(staged, partial)
        assert names(tmp_path / "deep") == ["out.partial"]
    assert names(tmp_path / "deep") == ["out"]
    assert content(tmp_path / "deep" / "out") == "new"


@both
@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_left_when_the_block_fails(staged: Staged, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill_and_raise(staged, staged(tmp_path / "out"), error)
    assert names(tmp_path) == []


@both
def test_an_output_with_a_relative_path_survives_a_change_of_folder(
    staged: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with staged(Path("out")) as partial:
        fill(staged, partial)
        os.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"]


def test_a_resumable_folder_is_kept_as_it_stands_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill_and_raise(staged_folder, staged_folder(tmp_path / "out", resumable=lambda error: True), KeyboardInterrupt)
    assert names(tmp_path) == ["out.partial"]
    with staged_folder(tmp_path / "out", resumable=lambda error: True) as partial:
        assert content(partial) == "new"
        fill(staged_folder, partial, "whole")
    assert content(tmp_path / "out") == "whole"


@both
def test_what_an_earlier_run_left_behind_is_started_over(staged: Staged, tmp_path: Path) -> None:
    leftover = tmp_path / "out.partial"
    (leftover / "sub").mkdir(parents=True)
    (leftover / ".qwen3-export-partial").touch()
    (leftover / "link").symlink_to(tmp_path)
    (leftover / "sub" / "old.txt").write_text("old")
    (leftover / "out").write_text("old and longer than the new one")
    with staged(tmp_path / "out") as partial:
        fill(staged, partial)
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


@both
def test_an_existing_output_is_refused_and_untouched(staged: Staged, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as partial:
        fill(staged, partial, "old")
    with pytest.raises(InputError, match="exists already") as caught, staged(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert caught.value.hint is not None
    assert "--force" in caught.value.hint
    assert content(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def ours(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.txt").write_text("old")
    write_manifest(folder, "test", {})
    return folder


def test_force_replaces_a_folder_that_is_ours(tmp_path: Path) -> None:
    ours(tmp_path / "out")
    with staged_folder(tmp_path / "out", force=True) as partial:
        fill(staged_folder, partial)
        assert content(tmp_path / "out") == "old"
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path / "out") == ["data.txt"]
    assert names(tmp_path) == ["out"]


def test_force_keeps_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    ours(tmp_path / "out")
    with pytest.raises(ValueError, match="stop"):
        fill_and_raise(staged_folder, staged_folder(tmp_path / "out", force=True), ValueError)
    assert content(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_force_does_not_replace_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="did not write"), staged_folder(tmp_path / "out", force=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["out"]


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out", force=True) as partial:
        fill(staged_folder, partial)
    assert content(tmp_path / "out") == "new"


def test_force_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = ours(tmp_path / "target")
    (tmp_path / "out").symlink_to(target)
    with staged_folder(tmp_path / "out", force=True) as partial:
        fill(staged_folder, partial)
    assert content(tmp_path / "out") == "new"
    assert content(target) == "old"
    assert names(tmp_path) == ["out", "target"]


def test_force_replaces_a_file_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with staged_file(tmp_path / "out", force=True) as partial:
        fill(staged_file, partial)
        assert content(tmp_path / "out") == "old"
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("old")
    ours(tmp_path / "folder")
    with pytest.raises(InputError), staged_folder(tmp_path / "file", force):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match="is a folder, a file was expected"), staged_file(tmp_path / "folder", force):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


HOLDER = """
import sys
from pathlib import Path
from qwen3_export.core import outputs

with getattr(outputs, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "data.txt" if partial.is_dir() else partial).write_text("theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(staged: Staged, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the same output until its input is closed."""
    command = [sys.executable, "-c", HOLDER, staged.__name__, str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate(timeout=30)


@both
def test_an_output_that_another_process_writes_is_refused(staged: Staged, tmp_path: Path) -> None:
    with other_process(staged, tmp_path / "out") as process:
        with pytest.raises(InputError, match=r"another run is writing .*/out") as caught, staged(tmp_path / "out"):
            pytest.fail("the block must not run")
        assert caught.value.hint is not None
    assert process.returncode == 0
    assert content(tmp_path / "out") == "theirs"
    assert names(tmp_path) == ["out"]


@both
def test_the_lock_dies_with_its_process(staged: Staged, tmp_path: Path) -> None:
    with other_process(staged, tmp_path / "out") as process:
        process.kill()
        process.wait(30)
        with staged(tmp_path / "out") as partial:
            fill(staged, partial, "mine")
    assert content(tmp_path / "out") == "mine"
    assert names(tmp_path) == ["out"]


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, "onnx", {"name": "Übung", "values": [1, 2.5, None]})
    manifest = read_manifest(tmp_path)
    assert manifest["kind"] == "onnx"
    assert manifest["name"] == "Übung"
    assert manifest["values"] == [1, 2.5, None]
    assert (tmp_path / MANIFEST).read_text().endswith("}\n")


def test_a_manifest_that_is_missing_is_empty(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "\xff", '{"layout": 3}', '{"tensors": []}', "[" * 100_000])
def test_a_manifest_that_is_damaged_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=MANIFEST):
        read_manifest(tmp_path)


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert sha256_text("ü") == hashlib.sha256("ü".encode()).hexdigest()


def test_the_file_list_is_sorted_and_holds_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).write_text(name)
    assert file_list(tmp_path) == [
        {"path": name, "bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name in ("a", "b", "sub/c")
    ]


def test_a_small_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    for value in (1, 2):
        write_atomic(path, json.dumps({"blocks": value}))
        assert json.loads(path.read_text()) == {"blocks": value}
    assert names(tmp_path) == ["progress.json"]


def test_a_partial_folder_that_somebody_else_filled_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no unfinished output"), staged_folder(tmp_path / "out"):
        pass
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_of_ours_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / ".qwen3-export-partial").touch()
    (left / "model.onnx").write_text("half")
    with staged_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("done")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
