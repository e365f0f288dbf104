"""Runs that kill -9 ends, and what they leave to the next one on the same output."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.outputs import partial_path
from tests.cli.deep_runs import OPTIONS, start_run
from tests.cli.helpers import call, finish, finished_blocks, fork, hashes, names, refused, start, wait_for

KILLS = 10


@pytest.fixture(scope="module")
def killed(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after a finished block."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = start_run(deep_model, out)
    wait_for(lambda: finished_blocks(out), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert names(out.parent) == ["out.partial"]
    return partial_path(out)


def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bytes(
    deep_model: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out, moments, killed, stopped_in = tmp_path / "out", random.Random(0), 0, set()
    command = ("quantize", deep_model, *OPTIONS, "--output", out, "--threads", "1")
    while killed < KILLS:
        before, more = finished_blocks(out), moments.choice((0, 0, 1, 2))
        process = fork(*command)
        while process.is_alive() and finished_blocks(out) < before + more:
            time.sleep(0.002)
        # Somewhere in the start, or in the block that follows.
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert names(tmp_path) in ([], ["out.partial"], ["out"])
        killed += process.exitcode != 0
        stopped_in.add(finished_blocks(out))
        if out.exists():
            assert hashes(out) == undisturbed
            shutil.rmtree(out)
    assert len(stopped_in) > 3
    assert out.exists() or call(*command).code == 0
    assert hashes(out) == undisturbed
    assert names(tmp_path) == ["out"]


def test_resume_needs_the_same_arguments(
    deep_model: Path, killed: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed, partial_path(out))
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 2000)
    others: dict[str, tuple[Any, ...]] = {
        "recipe": ("--recipe", "gptq-w4a16-g128"),
        "seed": ("--seed", "1"),
        "calibration": ("--calibration", text),
        "layout": ("--layout", "gptq"),
    }
    before = hashes(partial_path(out))
    for name, change in others.items():
        outcome = call("quantize", deep_model, *OPTIONS, *change, "--output", out)
        # Another text also means other rows under the same seed: the first difference is named.
        refused(outcome, 2, "another calibration" if name == "seed" else f"another {name}", "--no-resume")
        assert hashes(partial_path(out)) == before
    outcome = call("quantize", deep_model, *OPTIONS, "--output", out, "--json", "--no-resume")
    assert outcome.json["resumed_blocks"] == 0
    assert hashes(out) == undisturbed


def test_damaged_state_is_refused(deep_model: Path, killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed, partial_path(out))
    state = partial_path(out) / "state"
    kept = next(state.glob("*-000*.samples"))
    kept.write_bytes(kept.read_bytes()[:1000])
    refused(call("quantize", deep_model, *OPTIONS, "--output", out), 2, kept.name, "--no-resume")
    (state / "progress.json").write_text("{")
    refused(call("quantize", deep_model, *OPTIONS, "--output", out), 2, "progress.json", "--no-resume")
    assert names(tmp_path) == ["out.partial"]


def test_second_run_on_one_folder_is_refused(deep_model: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start_run(deep_model, out)
    wait_for(lambda: finished_blocks(out), first)
    first.send_signal(signal.SIGSTOP)
    for more in ((), ("--no-resume",), ("--force",)):
        refused(call("quantize", deep_model, *OPTIONS, "--output", out, *more), 2, "another run is writing", "out")
    refused(call("onnx", deep_model, "--output", out), 2, "another run is writing")
    first.send_signal(signal.SIGCONT)
    assert finish(first).code == 0
    assert hashes(out) == undisturbed
    assert names(tmp_path) == ["out"]


def test_two_exports_to_one_file(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    first = start("gguf", made["quantized"], "--output", out)
    # A folder alone may be the place being tried out, which is given back.
    wait_for(lambda: len(list(partial_path(out).glob("*"))) > 1, first)
    first.send_signal(signal.SIGSTOP)
    refused(call("gguf", made["quantized"], "--output", out), 2, "another run is writing")
    first.send_signal(signal.SIGCONT)
    assert finish(first).code == 0
    assert hashes(out) == hashes(made["gguf"])
    assert names(tmp_path) == ["model.gguf"]


def test_export_takes_over_what_a_dead_one_left(made: dict[str, Path], tmp_path: Path) -> None:
    for kind, waits_for in (("tensorrt", "out.partial/model.onnx"), ("gguf", "out.partial")):
        place = tmp_path / kind
        place.mkdir()
        process = start(kind, made["quantized"], "--output", place / "out")
        wait_for((place / waits_for).exists, process)
        process.kill()
        assert finish(process).code == -signal.SIGKILL
        assert names(place) == ["out.partial"]
    assert call("onnx", made["quantized"], "--output", tmp_path / "tensorrt" / "out").code == 0
    assert hashes(tmp_path / "tensorrt" / "out") == hashes(made["onnx"])
    assert call("gguf", made["quantized"], "--output", tmp_path / "gguf" / "out").code == 0
    assert hashes(tmp_path / "gguf" / "out") == hashes(made["gguf"])
    assert names(tmp_path / "tensorrt") == names(tmp_path / "gguf") == ["out"]


def test_foreign_partial_folder_is_left_alone(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    quantize = ("quantize", model, "--recipe", "rtn-w4a16-g32")
    for command in (("onnx", made["quantized"]), quantize, (*quantize, "--no-resume")):
        refused(call(*command, "--output", tmp_path / "out"), 2, "out.partial")
        assert names(partial) == ["thesis.txt"]
    assert names(tmp_path) == ["out.partial"]


def test_builder_ends_with_a_run_that_is_killed(made: dict[str, Path], tmp_path: Path) -> None:
    """It would write on, into a folder that the next run has taken over."""
    plan = str(tmp_path / "trt.partial" / "model.plan").encode()

    def builders() -> list[Path]:
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [line] if plan in line.read_bytes() else []
        return found

    process = start("tensorrt", made["quantized"], "--output", tmp_path / "trt", "--sm", "8.9")
    # The interpreter is up when it has opened the plan, or its libraries.
    wait_for(lambda: any("tensorrt" in (line.parent / "maps").read_text() for line in builders()), process)
    process.kill()
    finish(process)
    end = time.monotonic() + 20
    while builders() and time.monotonic() < end:
        time.sleep(0.05)
    assert not builders()
