"""The campaign: trials of every kind, each in an empty folder.

Each trial has its own seed, so that it can be repeated alone.

python -m tests.hostile                      1,000 and more trials, prints `N tried, M faults`
python -m tests.hostile --kind configs -n 50
python -m tests.hostile --kind configs --only 17 --keep folder
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import kinds
from tests.hostile.child import Outcome, run_child
from tests.hostile.judge import faults, repeated, snapshot
from tests.hostile.trial import Place, Trial


@dataclass(frozen=True)
class Verdict:
    """The outcome of one trial and its faults."""

    kind: str
    number: int
    trial: Trial
    outcome: Outcome
    faults: list[str]

    def __str__(self) -> str:
        command = " ".join(str(part)[:80] for part in self.trial.command)
        return f"{self.kind} {self.number}: {self.trial.what}: {'; '.join(self.faults)}\n    {command}"


def names() -> list[str]:
    """Names of the kinds, which are those of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))


def attempt(kind: str, number: int, seed: int, bases: Path, keep: Path | None = None) -> Verdict:
    """Make one input, run its command, and judge the outcome."""
    folder = keep or Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        generator = importlib.import_module(f"tests.hostile.kinds.{kind}")
        trial: Trial = generator.make(random.Random(f"{seed} {kind} {number}"), Place(folder, bases))
        before, untouched = snapshot(folder), _stamp(bases)
        outcome = run_child(trial.command, folder, trial.env, trial.setup, trial.signal, trial.when)
        found = faults(trial, outcome, folder, before)
        if trial.then and not found:
            found = repeated(trial, run_child(trial.then, folder), folder, before)
        if _stamp(bases) != untouched:
            found.append("an input outside of the trial's folder is changed")
        return Verdict(kind, number, trial, outcome, found)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of everything below a folder."""
    found = []
    for place, _, files in os.walk(folder):
        for name in files:
            status = os.lstat(os.path.join(place, name))
            found.append((os.path.join(place, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def campaign(seed: int, each: int, bases: Path, chosen: list[str] | None = None) -> Iterator[Verdict]:
    """Run `each` trials of every chosen kind."""
    for kind in chosen or names():
        for number in range(each):
            yield attempt(kind, number, seed, bases)
