"""`plan` and the room on disks: what a run needs beside what is free, where its files would go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen3_export
from tests.cli.helpers import call, refused

COMMON = ("--recipe", "gptq-w4a16-g32", "--samples", "8", "--sequence-length", "64", "--no-time")
Full = Callable[[int], None]


def _plan(model: Path, *arguments: object) -> dict[str, Any]:
    outcome = call("plan", model, *COMMON, *arguments, "--json")
    values: dict[str, Any] = json.loads(outcome.out)
    assert outcome.code == (0 if values["possible"] else 2), outcome.err
    return values


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Full:
    """Sets the free bytes that every disk says it has."""
    real = shutil.disk_usage("/")

    def leave(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: real._replace(free=count))

    return leave


def test_what_is_needed_stands_beside_what_is_free(model: Path, tmp_path: Path, free: Full) -> None:
    free(5_000_000_000)
    output = tmp_path / "new" / "out"
    found = _plan(model, "--output", output)
    assert found["disks"] == [{"path": str(output.parent), "bytes": found["disk_bytes"], "free_bytes": 5_000_000_000}]
    shown = call("plan", model, *COMMON, "--output", output).out
    assert f"5.0 GB free in {output.parent}" in shown
    assert not output.parent.exists()


def test_a_disk_with_one_byte_too_few_makes_it_impossible(model: Path, tmp_path: Path, free: Full) -> None:
    needed = _plan(model)["disk_bytes"]
    free(needed)
    assert _plan(model)["possible"]
    free(needed - 1)
    for given in ((), ("--output", tmp_path / "out")):
        found = _plan(model, *given)
        assert not found["possible"]
        assert "of disk are needed" in found["reasons"][0]
        assert "--scratch" in found["reasons"][0]
        outcome = call("plan", model, *COMMON, *given)
        assert outcome.err.count("error: it cannot work: about") == 1
        assert "not possible: about" in outcome.out


def test_without_an_output_the_current_folder_counts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), real)[1])
    monkeypatch.chdir(tmp_path)
    assert _plan(model)["disks"][0]["path"] == str(tmp_path)
    assert asked == [tmp_path]


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_that_cannot_be_one_is_refused(model: Path, output: str) -> None:
    refused(call("plan", model, *COMMON, "--output", output), 2, "is the current folder or around it")


def test_this_machines_disk_is_not_held_against_a_plan_for_others(model: Path, tmp_path: Path, free: Full) -> None:
    free(1000)
    for other in (("--memory", "8GiB"), ("--nodes", "2")):
        found = _plan(model, *other)
        assert found["possible"]
        assert found["disks"] == []
        named = _plan(model, *other, "--output", tmp_path / "out")
        assert "of disk are needed" in named["reasons"][0]


def test_activations_count_where_scratch_puts_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders on one disk share its room; on two disks each has its own."""
    shared = _plan(model, "--output", tmp_path / "out", "--scratch", tmp_path / "scratch")
    assert [disk["bytes"] for disk in shared["disks"]] == [shared["disk_bytes"]]
    other = Path("/dev/shm")
    if other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    arguments = ("--output", tmp_path / "out", "--scratch", other / "scratch")
    result, spilled = _plan(model, *arguments)["disks"]
    assert result["bytes"] + spilled["bytes"] == shared["disk_bytes"]
    assert spilled["path"] == str(other / "scratch")
    real = shutil.disk_usage("/")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: real._replace(free=1000 if Path(path).is_relative_to(other) else 1 << 40)
    )
    assert f"1000 B are free in {other / 'scratch'}" in _plan(model, *arguments)["reasons"][0]


def test_files_of_an_unfinished_run_need_no_more_room(model: Path, tmp_path: Path) -> None:
    whole = _plan(model, "--output", tmp_path / "out")["disks"][0]["bytes"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard").write_bytes(bytes(1000))
    assert _plan(model, "--output", tmp_path / "out")["disks"][0]["bytes"] == whole - 1000


def test_plan_and_quantize_ask_for_the_same_room(model: Path, tmp_path: Path, free: Full) -> None:
    needed = _plan(model, "--output", tmp_path / "out")["disks"][0]["bytes"]
    free(needed - (1 << 16))
    quantizing = ("quantize", model, *COMMON[:-1], "--output", tmp_path / "out")
    refused(call(*quantizing), 4, "are needed")
    free(needed)
    assert call(*quantizing).code == 0


def test_from_python(model: Path, tmp_path: Path, free: Full) -> None:
    free(1000)
    found = qwen3_export.plan(
        str(model), "rtn-w4a16-g32", output=tmp_path / "out", scratch=tmp_path / "scratch", measure=False
    )
    assert not found["possible"]
    assert found["disks"][0]["free_bytes"] == 1000
