"""What a generator gets and gives: a place to put its input, and one command line with what may come of it.

    kinds/configs.py:  make(random, place) -> Trial        puts a damaged copy into place.folder
                                                           names the command that shall meet it

The judge then asks of every trial: an exit code of the contract, one `error:` line and no traceback,
no input changed, nothing new beside the output, an end within the limits of time and memory.
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

    `what` says the damage in words. `codes` are the exit codes that are right: narrow them where only a refusal is.
    `outputs` may appear, or be replaced, when the command ends with 0 or 1. `keeps` may be left by a run that was
    stopped. `env` is added to the environment (None removes a variable). `setup` runs in the child before the command:
    closed streams, limits. `signal` is sent when `when()` holds. `check` raises AssertionError after a success.
    `then` is a command that must end well afterwards and leave nothing but `outputs`: what a stopped run is
    repeated with.
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
    """An empty folder for one trial, and finished inputs by name that must be copied before they are damaged.

    Names: `model` (16 bits, with tokenizer), `moe` (one with experts), `quantized`, `onnx`, `gguf`, `reference`,
    `imatrix`, `report`.
    """

    folder: Path
    bases: Path

    def base(self, name: str) -> Path:
        """A finished input, for reading only."""
        return self.bases / FILES.get(name, name)

    def copy(self, name: str, to: str | None = None) -> Path:
        """A copy of a finished input in the trial's folder, to damage."""
        source = self.base(name)
        target = self.folder / (to or source.name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    @property
    def out(self) -> Path:
        """Where the command shall write."""
        return self.folder / "out"


FILES = {"gguf": "model.gguf", "reference": "reference.safetensors", "imatrix": "matrix.gguf"}
REFUSED = frozenset({2})


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(values), encoding="utf-8")
