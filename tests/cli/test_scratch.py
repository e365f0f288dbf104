"""`--scratch`: activations on a disk of their own; the same bytes, runs that go on, full disks, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.manifest import MARKER
from qwen3_export.solve import loop
from qwen3_export.solve.calibration.activations import SampleFile, SpareFiles
from tests.cli.deep_runs import LAYERS
from tests.cli.helpers import call, fill, finished_blocks, hashes, names, refused

SHORT = ("--samples", "8", "--sequence-length", "64", "--threads", "1")
OPTIONS = ("--recipe", "gptq-w4a16-g32", *SHORT)


class Killed(BaseException):
    """Stands for the end of the process; nothing is cleaned up behind a real one, so little is here."""


@pytest.fixture(scope="module")
def undisturbed(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of a run without a scratch folder."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert call("quantize", deep_model, *OPTIONS, "--output", out).code == 0
    return hashes(out)


@pytest.fixture
def after_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`after_blocks(n, then)` calls `then` when n blocks are on the disk."""
    keep: Any = loop._keep_block

    def at(count: int, then: Callable[[], object]) -> None:
        def keep_block(job: Any, target: Any, layer: int, *more: Any) -> None:
            keep(job, target, layer, *more)
            if layer + 1 == count:
                then()

        monkeypatch.setattr(loop, "_keep_block", keep_block)

    return at


def stop() -> None:
    raise Killed


def stopped(out: Path, model: Path, *more: object) -> None:
    """Run until the hook of `after_blocks` ends it."""
    with suppress(Killed):
        call("quantize", model, *OPTIONS, "--output", out, *more)
    assert 0 < finished_blocks(out) < LAYERS


def test_source_is_read_only_and_scratch_is_left_clean(
    deep_model: Path, undisturbed: dict[str, str], disk: Callable[..., Path], tmp_path: Path
) -> None:
    """The source as a hub's cache has it: links to files of another folder, on a disk that cannot be written."""
    store = disk(8 << 20)
    blobs, snapshot = store / "blobs", store / "snapshots" / deep_model.name
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in deep_model.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
    spilled, out = disk(16 << 20), disk(24 << 20) / "out"
    assert call("quantize", snapshot, *OPTIONS, "--output", out, "--scratch", spilled).code == 0
    # The manifest, and the card made from it, say where a source came from.
    told = {"qwen3-export.json", "README.md"}
    found = hashes(out)
    assert {name: found[name] for name in found.keys() - told} == {
        name: undisturbed[name] for name in undisturbed.keys() - told
    }
    assert names(spilled) == []
    assert names(out.parent) == ["out"]
    made = tmp_path / "made" / "here"
    assert call("quantize", snapshot, *OPTIONS, "--output", out, "--scratch", made, "--force").code == 0
    assert not made.parent.exists(), "a folder that was made for the run goes with it"


@pytest.mark.parametrize(("first", "then"), [("a", "b"), ("a", None), (None, "b"), ("a", "a")])
def test_a_stopped_run_goes_on_with_the_same_or_another_scratch(
    first: str | None,
    then: str | None,
    deep_model: Path,
    undisturbed: dict[str, str],
    after_blocks: Callable[..., None],
    tmp_path: Path,
) -> None:
    def scratch(name: str | None) -> list[object]:
        return ["--scratch", tmp_path / "scratch" / name] if name else []

    for name in ("a", "b"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
    after_blocks(3, stop)
    out = tmp_path / "out"
    stopped(out, deep_model, *scratch(first))
    if first:
        (kept,) = (tmp_path / "scratch" / first).iterdir()
        assert (kept / MARKER).is_file()
        assert (kept / "quantized-0003.samples").is_file()
    after_blocks(LAYERS + 1, stop)
    done = finished_blocks(out)
    outcome = call("quantize", deep_model, *OPTIONS, "--output", out, *scratch(then), "--json")
    assert outcome.json["resumed_blocks"] == done
    assert hashes(out) == undisturbed
    assert [names(tmp_path / "scratch" / name) for name in ("a", "b")] == [[], []]
    assert names(tmp_path) == ["out", "scratch"]


def test_full_scratch_disk_ends_cleanly_and_the_run_goes_on(
    deep_model: Path,
    undisturbed: dict[str, str],
    after_blocks: Callable[..., None],
    disk: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Files that are written over take no new room, and so never meet a full disk.
    monkeypatch.setattr(SpareFiles, "put", lambda _, path: path.unlink())
    spilled, out = disk(16 << 20), tmp_path / "out"
    command = ("quantize", deep_model, *OPTIONS, "--output", out, "--scratch", spilled)
    after_blocks(2, lambda: fill(spilled / "filler"))
    refused(call(*command), 4, "disk is full", str(spilled), f"(on {spilled})", "goes on where it stopped", "--scratch")
    done = finished_blocks(out)
    assert 2 <= done < LAYERS
    after_blocks(LAYERS + 1, stop)
    refused(call(*command), 4, f"{spilled}: about", "are needed", "--scratch on another disk")
    assert finished_blocks(out) == done
    (spilled / "filler").unlink()
    assert call(*command, "--json").json["resumed_blocks"] == done
    assert hashes(out) == undisturbed
    assert names(spilled) == []


def test_room_on_both_disks_is_checked_before_the_start(deep_model: Path, disk: Callable[..., Path]) -> None:
    small, large = disk(64 << 10), disk(16 << 20)
    for output, scratch in ((small, large), (large, small)):
        outcome = call("quantize", deep_model, *OPTIONS, "--output", output / "out", "--scratch", scratch)
        refused(outcome, 4, f"{small}: about", "are needed")
        assert names(small) == names(large) == []


def test_what_lies_in_a_scratch_folder_is_respected(
    deep_model: Path, after_blocks: Callable[..., None], tmp_path: Path
) -> None:
    out, spilled = tmp_path / "out", tmp_path / "scratch"
    spilled.mkdir()
    (spilled / "notes.txt").write_text("somebody's")
    after_blocks(2, stop)
    stopped(out, deep_model, "--scratch", spilled)
    (own,) = (path for path in spilled.iterdir() if path.is_dir())
    (own / MARKER).unlink()
    again = ("quantize", deep_model, *OPTIONS, "--output", out, "--scratch", spilled)
    refused(call(*again), 2, str(own), "is no unfinished output")
    assert finished_blocks(out) == 2, "what is wrong with the scratch folder leaves the run as it is"
    shutil.rmtree(own)
    refused(call(*again), 2, "activations are not there", "--no-resume")
    assert finished_blocks(out) == 2
    for place in (deep_model, out, out / "inside"):
        message = "the input" if place == deep_model else "lies inside the output"
        refused(call(*again[:-1], place), 2, message)
    after_blocks(LAYERS + 1, stop)
    assert call(*again, "--no-resume").code == 0
    assert names(spilled) == ["notes.txt"]


def test_starting_over_removes_what_the_earlier_run_left_elsewhere(
    deep_model: Path, after_blocks: Callable[..., None], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", tmp_path / "first"
    first.mkdir()
    after_blocks(1, stop)
    stopped(out, deep_model, "--scratch", first)
    assert len(names(first)) == 1
    after_blocks(LAYERS + 1, stop)
    assert call("quantize", deep_model, *OPTIONS, "--output", out, "--no-resume").code == 0
    assert names(first) == []


def test_other_commands_spill_there_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled, seen = tmp_path / "scratch", set[str]()
    spilled.mkdir()
    write: Any = SampleFile.write

    def spy(self: SampleFile, sample: int, tensor: Any) -> None:
        seen.add(os.path.relpath(self.path, tmp_path).split(os.sep)[0])
        write(self, sample, tensor)

    monkeypatch.setattr(SampleFile, "write", spy)
    search = ("recipes", "search", model, "--target-bpw", "6", "--samples", "4", "--sequence-length", "32")
    commands: dict[str, tuple[object, ...]] = {
        "imatrix.gguf": ("calibrate", model, *SHORT),
        "model.gguf": ("gguf", model, *OPTIONS),
        "recipe.yaml": (*search, "--measure-rows", "2"),
    }
    for name, command in commands.items():
        seen.clear()
        outcome = call(*command, "--output", tmp_path / name, "--scratch", spilled)
        assert outcome.code == 0, outcome.err
        assert seen == {"scratch"}, name
        assert names(spilled) == []
    refused(call("gguf", model, "--output", tmp_path / "x.gguf", "--scratch", spilled), 2, "--scratch", "no --recipe")
