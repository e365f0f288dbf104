"""Runs that are stopped: Ctrl-C, SIGTERM, kill -9, a full disk. They go on and end with the same bytes."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.cli import _after_interrupt, run
from qwen3_export.core.outputs import partial_path
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.solve.preflight import artifact_bytes
from tests.cli.helpers import call, fill, finish, finished_blocks, fork, hashes, names, refused, start, wait_for

OPTIONS = ("--recipe", "gptq-w4a16-g32", "--samples", "32", "--sequence-length", "128")
LAYERS = 8
KILLS = 10


@pytest.fixture(scope="module")
def undisturbed(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of every file of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert call("quantize", deep_model, *OPTIONS, "--output", out, "--threads", "1").code == 0
    return hashes(out)


def _start(model: Path, out: Path) -> subprocess.Popen[str]:
    return start("quantize", model, *OPTIONS, "--output", out)


@pytest.fixture(scope="module")
def killed(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after a finished block."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = _start(deep_model, out)
    wait_for(lambda: finished_blocks(out), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert names(out.parent) == ["out.partial"]
    return partial_path(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on(
    number: signal.Signals, deep_model: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _start(deep_model, out)
    wait_for(lambda: finished_blocks(out), process)
    process.send_signal(number)
    refused(finish(process), 130, "interrupted", f"finished blocks are kept in {out}.partial: repeat the command")
    done = finished_blocks(out)
    assert 0 < done < LAYERS
    assert names(tmp_path) == ["out.partial"]
    outcome = call("quantize", deep_model, *OPTIONS, "--output", out, "--json", "--threads", "2")
    assert outcome.json["resumed_blocks"] == done
    assert f"resuming at block {done + 1} of {LAYERS}" in outcome.err
    assert hashes(out) == undisturbed
    assert names(tmp_path) == ["out"]


def test_interrupt_while_starting_is_clean(deep_model: Path, tmp_path: Path) -> None:
    process = _start(deep_model, tmp_path / "out")
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    refused(finish(process), 130, "interrupted", "nothing was written: repeat the command to start over")
    assert names(tmp_path) == []


def test_interrupt_that_native_code_wrapped_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def met_in_native_code(*_arguments: object) -> Any:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr("typer.main.get_command", met_in_native_code)
    assert run(["inspect", "reference-model"]) == 130
    assert "error: interrupted\n" in capsys.readouterr().err


LOST = """
import os, signal, time, weakref
from qwen3_export import cli

class Thing: pass

def run(arguments):
    thing = Thing()
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    time.sleep(60)

cli.run = run
cli.main()
"""
# As a shell starts what runs in the background, and a service manager ends it.
LOST_BEHIND_IGNORED = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + LOST.replace("SIGINT", "SIGTERM")


@pytest.mark.parametrize("code", [LOST, LOST_BEHIND_IGNORED], ids=["SIGINT", "SIGTERM, SIGINT ignored"])
def test_interrupt_that_python_loses_in_a_callback_comes_again(code: str) -> None:
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (child.returncode, child.stdout) == (130, "")
    assert child.stderr.startswith("error: interrupted\n")
    assert "Traceback" not in child.stderr


def test_interrupt_behind_a_finished_output_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_arguments: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3_export.cli.console.Console.result", interrupted)
    command = ["quantize", "reference-model", "--recipe", "rtn-w4a16-g128", "--output", str(tmp_path / "out")]
    assert run(command) == 130
    assert f"hint: {tmp_path / 'out'} was finished before that, and is whole\n" in capsys.readouterr().err
    assert names(tmp_path) == ["out"]
    monkeypatch.setattr("qwen3_export.solve.quantize.quantize", interrupted)
    assert run([*command, "--force"]) == 130
    assert "hint: nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (("-oNAME",), "NAME"),
        (("--output=NAME",), "NAME"),
        (("validate", "a.gguf", "--report", "NAME"), "NAME"),
        (("gguf", "--output", "NAME.gguf"), "NAME-00001-of-00003.gguf"),
    ],
)
def test_the_hint_knows_every_spelling_of_an_output(words: tuple[str, ...], made: str, tmp_path: Path) -> None:
    arguments = [word.replace("NAME", str(tmp_path / "NAME")) for word in words]
    assert "nothing was written" in _after_interrupt(arguments, 1.0)
    (tmp_path / made).touch()
    assert "is whole" in _after_interrupt(arguments, 1.0)
    assert "nothing was written" in _after_interrupt(arguments, time.time() + 1)


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
    first = _start(deep_model, out)
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


def test_interrupted_export_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "trt"
    process = start("tensorrt", made["quantized"], "--output", out)
    wait_for(lambda: (partial_path(out) / "model.onnx").exists(), process)
    process.send_signal(signal.SIGTERM)
    refused(finish(process), 130, "interrupted")
    assert names(tmp_path) == []


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


def test_disk_that_fills_up_during_the_run(
    deep_model: Path, undisturbed: dict[str, str], disk: Callable[..., Path]
) -> None:
    place = disk(48 << 20)
    out = place / "out"
    process = _start(deep_model, out)
    wait_for(lambda: finished_blocks(out), process)
    process.send_signal(signal.SIGSTOP)
    fill(place / "filler")
    process.send_signal(signal.SIGCONT)
    refused(finish(process), 4, "disk is full", "goes on where it stopped")
    done = finished_blocks(out)
    assert 0 < done < LAYERS
    assert names(place) == ["filler", "out.partial"]
    refused(call("quantize", deep_model, *OPTIONS, "--output", out), 4, "MiB are needed", "free some room")
    assert finished_blocks(out) == done
    (place / "filler").unlink()
    outcome = call("quantize", deep_model, *OPTIONS, "--output", out, "--json")
    assert outcome.json["resumed_blocks"] == done
    assert hashes(out) == undisturbed
    assert names(place) == ["out"]


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "rtn-w4a16-g32"])
def test_estimate_of_the_disk_is_enough(recipe: str, deep_model: Path, disk: Callable[..., Path]) -> None:
    """What the preflight asks for suffices, however many blocks there are."""
    command = ("quantize", deep_model, "--recipe", recipe, *OPTIONS[2:], "--json")
    probe = disk(64 << 10)
    refusal = call(*command, "--output", probe / "out")
    refused(refusal, 4, "MiB are needed")
    needed = float(refusal.err.partition("about ")[2].split()[0])
    place = disk(int((needed + 0.1) * (1 << 20)) // 4096 * 4096)
    assert call(*command, "--output", place / "out").code == 0


def test_disk_that_is_full_at_the_end(deep_model: Path, disk: Callable[..., Path]) -> None:
    """The estimate knows tensors and sidecars, not the last kilobytes of JSON."""
    recipe = "rtn-w4a16-g32"
    needed = artifact_bytes(open_source(str(deep_model)), load_recipe(recipe))
    place = disk((needed // 4096 + 2) * 4096)
    command = ("quantize", deep_model, "--recipe", recipe, "--output", place / "out")
    refused(call(*command), 4, "disk is full")
    assert finished_blocks(place / "out") == LAYERS
    assert names(place) == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    assert call(*command, "--json").json["resumed_blocks"] == LAYERS
    assert names(place) == ["out"]
