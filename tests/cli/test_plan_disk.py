"""`plan` and the room on disks: what a run needs beside what is free, where its files would go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen3_export
from qwen3_export.core.disk import stored_bytes
from qwen3_export.core.working_folders import quantized_path
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


def _exported(model: Path, *formats: str, output: Path) -> tuple[int, dict[str, Any]]:
    """Bytes that the formats add, beside the whole answer."""
    asked = [argument for name in formats for argument in ("--format", name)]
    found = _plan(model, *asked, "--output", output)
    return sum(found["formats"][name]["bytes"] for name in formats), found


def test_exports_count_beside_the_quantized_folder(model: Path, tmp_path: Path, free: Full) -> None:
    """Activations are gone by then: the fuller moment counts, on each disk."""
    output, scratch = tmp_path / "out", ("--scratch", tmp_path / "scratch")
    alone, folder = (_plan(model, *given, "--output", output) for given in ((), ("--format", "compressed-tensors")))
    assert folder["disk_bytes"] == alone["disk_bytes"]
    # The same types, rounded: no activations, the folder alone.
    rounded = _plan(model, "--output", output, "--recipe", "rtn-w4a16-g32")["disk_bytes"]
    for formats in (("onnx",), ("gguf",), ("onnx", "onnx-standard", "gguf")):
        exported, found = _exported(model, *formats, output=output)
        assert found["disk_bytes"] == max(alone["disk_bytes"], rounded + exported)
        assert [disk["bytes"] for disk in found["disks"]] == [found["disk_bytes"]]
    asked = [argument for name in formats for argument in ("--format", name)]
    assert _plan(model, *asked, *scratch, "--output", output)["disk_bytes"] == found["disk_bytes"]
    free(found["disk_bytes"] - 1)
    assert "of disk are needed" in _plan(model, *asked, "--output", output)["reasons"][0]
    assert found["disk_bytes"] > alone["disk_bytes"]
    assert _plan(model, "--output", output)["possible"]


def test_an_exports_unfinished_copy_needs_no_more_room(model: Path, tmp_path: Path) -> None:
    """The copy that the same export would go on with; `quantize` does not read it."""
    output = tmp_path / "out"
    _, whole = _exported(model, "onnx", output=output)
    alone = _plan(model, "--output", output)["disks"][0]["bytes"]
    copy = tmp_path / "out.quantized.partial" / "model.partial"
    copy.mkdir(parents=True)
    (copy / "shard").write_bytes(bytes(1000))
    assert _exported(model, "onnx", output=output)[1]["disks"][0]["bytes"] == whole["disks"][0]["bytes"] - 1000
    assert _plan(model, "--output", output)["disks"][0]["bytes"] == alone


def test_the_copy_is_where_an_export_leaves_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3_export.ship.gguf.export_gguf", stopped)
    exporting = ("gguf", model, *COMMON[:-1], "--output", tmp_path / "m.gguf")
    assert call(*exporting).code == 130
    copy = stored_bytes(quantized_path(tmp_path / "m.gguf"))
    assert copy > 0
    _, whole = _exported(model, "gguf", output=tmp_path / "other.gguf")
    _, rest = _exported(model, "gguf", output=tmp_path / "m.gguf")
    assert whole["disks"][0]["bytes"] - rest["disks"][0]["bytes"] == copy


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
