"""Runs that kill -9 ends when their output is whole: the empty partial folder goes with the next one on it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_export.core.manifest import MARKER
from qwen3_export.core.outputs import check_output, partial_path, staged_file, staged_folder
from qwen3_export.errors import InputError
from tests.cli.helpers import call, finish, hashes, names, refused

# Kills its own process where it would remove a folder and the file of its first argument is there.
KILLED = """
import os, shutil, signal, sys
usual = shutil.rmtree
def rmtree(path, *more, **named):
    if os.path.exists(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    usual(path, *more, **named)
shutil.rmtree = rmtree
from qwen3_export.cli import run
sys.exit(run(sys.argv[2:]))
"""
# By what is written: its file that is moved last, all of its files, and the options.
WRITERS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "one file": ("m.gguf", ["m.gguf"], ()),
    "shards": ("m-00001-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ("--split-max-size", "2M")),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_next_run_removes_what_is_left(kind: str, model: Path, tmp_path: Path) -> None:
    last, files, options = WRITERS[kind]
    command = ("gguf", model, "--type", "bf16", *options, "--output", tmp_path / "m.gguf")
    line = [sys.executable, "-c", KILLED, tmp_path / last, *command]
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert finish(process).code == -signal.SIGKILL
    assert names(tmp_path) == [*files, "m.gguf.partial"]
    before = hashes(tmp_path)
    refused(call(*command), 2, f"{files[0]} exists already", "--force")
    assert names(tmp_path) == files
    assert hashes(tmp_path).items() < before.items()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished output, with a leftover beside it."""
    output = tmp_path / "out"
    output.mkdir()
    partial_path(output).mkdir()
    (partial_path(output) / MARKER).touch()
    return output


@pytest.fixture
def partial(output: Path) -> Path:
    return partial_path(output)


def refuses(output: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        check_output(output)


def test_a_folder_that_is_checked_or_staged_loses_it(output: Path) -> None:
    refuses(output)
    assert names(output.parent) == ["out"]
    partial_path(output).mkdir()
    (partial_path(output) / MARKER).touch()
    with pytest.raises(InputError, match="exists already"), staged_folder(output):
        pytest.fail("the block must not run")
    assert names(output.parent) == ["out"]


def test_a_file_that_is_staged_loses_it(output: Path) -> None:
    output.rmdir()
    output.write_text("whole")
    with pytest.raises(InputError, match="exists already"), staged_file(output):
        pytest.fail("the block must not run")
    assert names(output.parent) == ["out"]
    assert output.read_text() == "whole"


def test_what_holds_something_is_left(output: Path, partial: Path) -> None:
    (partial / "state").mkdir()
    refuses(output)
    assert names(partial) == [MARKER, "state"]


def test_what_is_not_ours_is_left(output: Path, partial: Path, tmp_path: Path) -> None:
    (partial / MARKER).unlink()
    refuses(output)
    assert names(partial) == []
    (partial / MARKER).mkdir()
    refuses(output)
    assert names(partial) == [MARKER]


def test_a_link_to_one_is_left(output: Path, partial: Path, tmp_path: Path) -> None:
    target = partial.rename(tmp_path / "other.partial")
    partial.symlink_to(target)
    refuses(output)
    assert names(target) == [MARKER]
    assert partial.is_symlink()


def test_one_that_a_run_holds_is_left(output: Path, partial: Path) -> None:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refuses(output)
        assert names(partial) == [MARKER]
    finally:
        os.close(descriptor)
