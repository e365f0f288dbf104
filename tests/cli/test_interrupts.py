"""Runs that Ctrl-C or SIGTERM stops: they say what is kept, and go on to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.cli import _after_interrupt, run
from qwen3_export.core.outputs import partial_path
from tests.cli.deep_runs import LAYERS, OPTIONS, start_run
from tests.cli.helpers import call, finish, finished_blocks, hashes, names, refused, start, wait_for


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on(
    number: signal.Signals, deep_model: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_run(deep_model, out)
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
    process = start_run(deep_model, tmp_path / "out")
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


def test_interrupted_export_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "trt"
    process = start("tensorrt", made["quantized"], "--output", out)
    wait_for(lambda: (partial_path(out) / "model.onnx").exists(), process)
    process.send_signal(signal.SIGTERM)
    refused(finish(process), 130, "interrupted")
    assert names(tmp_path) == []
