"""A sample of the campaign in every run of the tests, and that the judge sees each kind of fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.hostile.bases import make_bases
from tests.hostile.campaign import attempt, names
from tests.hostile.child import Outcome
from tests.hostile.judge import faults, snapshot
from tests.hostile.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
SEED, EACH = 0, 3


def test_no_faults_in_a_sample() -> None:
    """In a process of its own: a child forked from one where other tests have left threads may crash by that alone."""
    command = [sys.executable, "-m", "tests.hostile", "--seed", str(SEED), "--each", str(EACH)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{EACH * len(names())} tried, 0 faults" in done.stdout


def test_a_trial_is_the_same_every_time(tmp_path: Path) -> None:
    """In a process of its own, too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        first, second = pool.submit(_twice, tmp_path).result()
    assert first == second


def _twice(folder: Path) -> list[tuple[str, int | None]]:
    """One trial, made and run two times: what it was, and the exit code."""
    bases = make_bases(folder)
    found = [attempt("configs", 3, 7, bases) for _ in range(2)]
    return [(item.trial.what, item.outcome.code) for item in found]


ERROR = "error: out is no folder\n"
OUTCOMES: dict[str, Outcome] = {
    "exit code": Outcome(1, "", ERROR, 0),
    "exit code -11": Outcome(-signal.SIGSEGV, "", "", 0),
    "traceback": Outcome(2, "", f"Traceback (most recent call last):\n{ERROR}", 0),
    "unexpected": Outcome(2, "", "error: unexpected KeyError: 3\n", 0),
    "no end": Outcome(None, "", "", 0),
    "0 error lines": Outcome(2, "", "", 0),
    "2 error lines": Outcome(2, "", ERROR * 2, 0),
    "code 0 and error": Outcome(0, "", ERROR, 0),
    "code 0, but no out": Outcome(0, "", "", 0),
}


@pytest.mark.parametrize("fault", OUTCOMES)
def test_the_judge_sees_bad_ends(fault: str, tmp_path: Path) -> None:
    trial = Trial("x", ("onnx",), outputs=(tmp_path / "out",))
    assert any(fault in found for found in faults(trial, OUTCOMES[fault], tmp_path, {}))
    assert not faults(trial, Outcome(2, "", ERROR, 0), tmp_path, {})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "lost": lambda folder: (folder / "input" / "a").unlink(),
    "changed": lambda folder: (folder / "input" / "a").write_text("other"),
    "changed: link": lambda folder: ((folder / "link").unlink(), (folder / "link").symlink_to("other")),
    "left behind: out.partial": lambda folder: (folder / "out.partial").mkdir(),
    "left behind: pipe": lambda folder: os.mkfifo(folder / "pipe"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_the_judge_sees_what_happened_to_files(fault: str, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a").write_text("precious")
    (tmp_path / "link").symlink_to("input")
    before = snapshot(tmp_path)
    DAMAGE[fault](tmp_path)
    (found,) = faults(Trial("x", ("onnx",)), Outcome(2, "", ERROR, 0), tmp_path, before)
    assert fault.partition(":")[0] in found
