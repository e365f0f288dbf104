"""Standard streams that are closed, full, gone or of a limited encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from random import Random

from tests.hostile.trial import Place, Trial


def make(random: Random, place: Place) -> Trial:
    """A sound command with odd standard streams."""
    commands: tuple[tuple[object, ...], ...] = (
        ("recipes", "list"),
        ("recipes", "show", "rtn-w4a16-g128"),
        ("inspect", place.base("model")),
        ("--help",),
        ("quantize", "--help"),
        ("--version",),
        ("run", place.base("gguf"), "--prompt", "é深", "--max-new-tokens", "3"),
        ("validate", place.base("onnx"), "--reference", place.base("reference")),
        ("bench", place.base("onnx"), "--prompt-tokens", "8", "--new-tokens", "1", "--repeat", "1"),
        ("gguf", place.base("quantized"), "--output", place.out),
        ("quantize", place.base("model"), "--recipe", "rtn-w4a16-g32", "--output", place.out),
    )
    command = random.choice(commands)
    if not {"--help", "--version"} & set(command):
        command += random.choice(((), ("--json",), ("--quiet",), ("--verbose",)))
    name = random.choice(sorted(_STREAMS))
    outputs = (place.out,) if place.out in command else ()
    env = random.choice(
        ({}, {"COLUMNS": "abc"}, {"COLUMNS": "0"}, {"COLUMNS": "9" * 30}, {"TERM": None}, {"LC_ALL": "C"})
    )
    what = f"{name} {env or ''}"
    # What cannot be written to stdout is lost, and says so.
    code = 4 if name == "stdout full" else 0
    return Trial(what, command, frozenset({code}), outputs=outputs, env=env, setup=_STREAMS[name])


def _closed(*numbers: int) -> Callable[[], None]:
    def setup() -> None:
        for number in numbers:
            name = ("stdin", "stdout", "stderr")[number]
            setattr(sys, name, None)
            os.close(number)

    return setup


def _replaced(number: int, opened: Callable[[], int]) -> Callable[[], None]:
    def setup() -> None:
        os.dup2(opened(), number)

    return setup


def _full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _gone() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def _encoding(name: str) -> Callable[[], None]:
    def setup() -> None:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            setattr(sys, stream, io.TextIOWrapper(os.fdopen(number, "wb", 0, closefd=False), name, write_through=True))

    return setup


_STREAMS: dict[str, Callable[[], None]] = {
    "stdin closed": _closed(0),
    "stdout closed": _closed(1),
    "stderr closed": _closed(2),
    "all closed": _closed(0, 1, 2),
    "stdout full": _replaced(1, _full),
    "stderr full": _replaced(2, _full),
    "stdout is a pipe without a reader": _replaced(1, _gone),
    "stderr is a pipe without a reader": _replaced(2, _gone),
    "ascii": _encoding("ascii"),
    "latin-1": _encoding("latin-1"),
    "cp437": _encoding("cp437"),
}
