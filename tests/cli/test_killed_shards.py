"""`gguf --split-max-size` that kill -9 ends at any moment: the next run leaves its own shards and others' files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.outputs import partial_path
from tests.cli.helpers import call, finish, hashes, names, refused, write_text_model

# Sends its own process a signal before it opens a shard to add to it (`open`), or moves one (`replace`), after so many.
SIGNALLED = """
import os, pathlib, sys
event, after, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
seen, usual = [], getattr(pathlib.Path, event)
def counted(path, *more, **named):
    if path.suffix == ".gguf" and (event == "replace" or more == ("ab",)):
        if len(seen) == after:
            os.kill(os.getpid(), number)
        seen.append(path)
    return usual(path, *more, **named)
setattr(pathlib.Path, event, counted)
from qwen3_export.cli import run
sys.exit(run(sys.argv[4:]))
"""
# Beside an output, with names close to its shards'.
OTHERS = ("m-00001-of-00003.gguf.txt", "m-00007-of-00003.gguf", "other-00001-of-00003.gguf", "m.gguf.old")
SIZES = {
    "the same command": ("1M",),
    "with --force": ("1M", "--force"),
    "another size": ("1500k",),
    "one file": ("1G",),
}


@pytest.fixture(scope="module")
def sizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("sizable") / "model", num_hidden_layers=9)


@pytest.fixture(scope="module")
def undisturbed_shards(sizable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Hashes of an output by its size option, of runs that nothing disturbed."""
    base, found = tmp_path_factory.mktemp("whole"), {}
    for size in ("1M", "1500k", "1G"):
        (base / size).mkdir()
        assert call(*command(sizable, base / size, size)).code == 0
        found[size] = hashes(base / size)
    assert [len(item) for item in found.values()] == [4, 3, 1]
    return found


def command(model: Path, folder: Path, *size: str) -> tuple[Any, ...]:
    return ("gguf", model, "--type", "bf16", "--output", folder / "m.gguf", "--split-max-size", *size)


def signalled(event: str, after: int, number: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a command whose process gets a signal at a certain event."""
    line = [sys.executable, "-c", SIGNALLED, event, str(after), str(number), *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after(moves: int, *arguments: object, event: str = "replace") -> None:
    """Run a command whose process is killed after so many shards have moved to their places."""
    process = signalled(event, moves, signal.SIGKILL, *arguments)
    assert finish(process).code == -signal.SIGKILL


def others_in(folder: Path) -> dict[str, str]:
    folder.mkdir()
    for name in OTHERS:
        (folder / name).write_text(f"mine: {name}")
    return hashes(folder)


@pytest.mark.parametrize("then", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("moves", [0, 1, 3])
def test_the_next_run_starts_over(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path, moves: int, then: tuple[str, ...]
) -> None:
    mine = others_in(folder := tmp_path / "out")
    kill_after(moves, *command(sizable, folder, "1M"))
    moved = set(names(folder)) - set(OTHERS) - {"m.gguf.partial"}
    assert len(moved) == moves
    # llama.cpp opens the first: it is not there before the others are.
    assert "m-00001-of-00004.gguf" not in moved
    outcome = call(*command(sizable, folder, *then))
    assert outcome.code == 0, outcome.err
    assert hashes(folder) == mine | undisturbed_shards[then[0]]
    assert not partial_path(folder / "m.gguf").exists()


@pytest.mark.parametrize("then", [("1500k",), ("1M", "--force")], ids=["another size", "the same"])
def test_killed_while_it_writes(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path, then: tuple[str, ...]
) -> None:
    mine = others_in(folder := tmp_path / "out")
    kill_after(1, *command(sizable, folder, "1M"), event="open")
    assert len(list(folder.glob("m.gguf.partial/*.gguf"))) == 2
    assert set(names(folder)) == {*OTHERS, "m.gguf.partial"}
    assert call(*command(sizable, folder, *then)).code == 0
    assert hashes(folder) == mine | undisturbed_shards[then[0]]


def test_what_took_a_moved_shards_place_is_somebody_elses(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    kill_after(2, *command(sizable, tmp_path, "1M"))
    last = tmp_path / "m-00004-of-00004.gguf"
    # As long and as old as the shard was.
    status, size = last.stat(), last.stat().st_size
    (tmp_path / "mine").write_bytes(b"x" * size)
    os.utime(tmp_path / "mine", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "mine").replace(last)
    before = hashes(tmp_path)
    for size_option in ("1M", "1500k", "1G"):
        refused(call(*command(sizable, tmp_path, size_option)), 2, "m-00004-of-00004.gguf exists already", "--force")
        assert hashes(tmp_path) == before
    assert call(*command(sizable, tmp_path, "1M", "--force")).code == 0
    assert hashes(tmp_path) == undisturbed_shards["1M"]


def test_an_output_that_was_being_replaced_is_never_half_of_each(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    assert call(*command(sizable, tmp_path, "1M")).code == 0
    again = ("gguf", sizable, "--type", "f16", *command(sizable, tmp_path, "1M", "--force")[4:])
    kill_after(2, *again)
    assert "m-00001-of-00004.gguf" not in names(tmp_path)
    refused(call(*command(sizable, tmp_path, "1M")), 2, "m-00002-of-00004.gguf exists already", "--force")
    assert call(*command(sizable, tmp_path, "1500k", "--force")).code == 0
    assert hashes(tmp_path) == undisturbed_shards["1500k"]


def test_an_output_in_fewer_shards_is_kept_until_the_new_one_is_whole(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    assert call(*command(sizable, tmp_path, "1500k")).code == 0
    kill_after(2, *command(sizable, tmp_path, "1M", "--force"))
    assert undisturbed_shards["1500k"].items() <= hashes(tmp_path).items()
    refused(call(*command(sizable, tmp_path, "1M")), 2, "m-00001-of-00003.gguf exists already")
    assert call(*command(sizable, tmp_path, "1M", "--force")).code == 0
    assert hashes(tmp_path) == undisturbed_shards["1M"]


def test_two_runs_in_other_numbers_of_shards_do_not_meet(
    sizable: Path, undisturbed_shards: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    first = signalled("replace", 1, signal.SIGSTOP, *command(sizable, tmp_path, "1M"))
    try:
        os.waitpid(first.pid, os.WUNTRACED)
        for size in ("1500k", "1G"):
            refused(call(*command(sizable, tmp_path, size, "--force")), 2, "another run is writing")
    finally:
        first.send_signal(signal.SIGCONT)
        assert finish(first).code == 0
    assert hashes(tmp_path) == undisturbed_shards["1M"]


def test_a_move_that_fails_takes_the_others_back(
    sizable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, moved = Path.replace, list[Path]()

    def failing(path: Path, target: Path) -> Path:
        if path.suffix == ".gguf":
            moved.append(target)
        if len(moved) == 3:
            raise OSError(5, "Input/output error", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    refused(call(*command(sizable, tmp_path, "1M")), 2, "Input/output error")
    assert len(moved) == 3
    assert names(tmp_path) == []
