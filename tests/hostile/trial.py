"""A trial: a command line on a damaged input, and its allowed outcomes.

    kinds/configs.py:  make(random, place) -> Trial        puts a damaged copy into place.folder,
                                                           and names the command that reads it

The judge then demands of every trial an exit code of the contract, one `error:` line and no traceback, unchanged
inputs, nothing new beside the output, and an end within the limits of time and memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One command line.

    `what` describes the damage in words. `codes` are the allowed exit codes: narrow them where only a refusal is right.
    `outputs` may appear, or be replaced, when the command ends with 0 or 1. `keeps` may be left by a stopped run. `env`
    is added to the environment (None removes a variable). `setup` runs in the child before the command, to close
    streams or set limits. `signal` is sent as soon as `when()` holds. `check` runs after a success and raises
    AssertionError. `then` is the command that repeats a stopped run: it must succeed and leave nothing but `outputs`.
    """

    what: str
    command: tuple[object, ...]
    codes: frozenset[int] = frozenset({0, 2})
    outputs: tuple[Path, ...] = ()
    keeps: tuple[Path, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    setup: Callable[[], None] | None = None
    signal: int | None = None
    when: Callable[[], bool] | None = None
    check: Callable[[], None] | None = None
    then: tuple[object, ...] | None = None


@dataclass(frozen=True)
class Place:
    """An empty folder for one trial, and sound inputs by name.

    Copy an input before damaging it. Names: `model` (16 bits, with tokenizer), `moe` (one with experts), `quantized`,
    `onnx`, `gguf`, `reference`, `imatrix`, `report`.
    """

    folder: Path
    bases: Path

    def base(self, name: str) -> Path:
        """A sound input, for reading only."""
        return self.bases / FILES.get(name, name)

    def copy(self, name: str, to: str | None = None) -> Path:
        """A copy of a sound input in the trial's folder, to damage."""
        source = self.base(name)
        target = self.folder / (to or source.name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    @property
    def out(self) -> Path:
        """The path to which the command shall write."""
        return self.folder / "out"


FILES = {"gguf": "model.gguf", "reference": "reference.safetensors", "imatrix": "matrix.gguf"}
REFUSED = frozenset({2})


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(values), encoding="utf-8")
