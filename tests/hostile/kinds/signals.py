"""Runs stopped by a signal at a random moment, then repeated, which must succeed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from random import Random

from tests.hostile.trial import Place, Trial

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
_SHORT = ("--samples", "4", "--sequence-length", "32")


def make(random: Random, place: Place) -> Trial:
    """A command that writes, and the moment of its signal."""
    number, delay = random.choice(_NUMBERS), random.uniform(0, 0.8)
    kind = random.choice(("quantize", "quantize", "onnx", "gguf", "reference", "onnx-recipe", "gguf-recipe"))
    name, _, recipe = kind.partition("-")
    source = place.base("model" if kind in ("quantize", "reference") or recipe else "quantized")
    options = {"quantize": ("--recipe", "gptq-w4a16-g32", *_SHORT), "reference": ("--tokens", "64", "--window", "32")}
    command: tuple[object, ...] = (name, source, *options.get(name, ()))
    if recipe:
        command += ("--recipe", "rtn-w4a16-g32")
    command += ("--output", place.out)
    # SIGKILL may leave files that the next run removes; other signals only those from which `quantize` goes on.
    may_stay = number == signal.SIGKILL or kind == "quantize" or bool(recipe)
    keeps = tuple(place.folder / f"out{end}" for end in (".partial", ".quantized.partial")) if may_stay else ()
    return Trial(
        f"{kind}: {signal.Signals(number).name} after {delay:.2f} s",
        command,
        frozenset({0, 130, -9} if number == signal.SIGKILL else {0, 130}),
        outputs=(place.out,),
        keeps=keeps,
        signal=number,
        when=_after(delay),
        then=(*command, "--force"),
    )


def _after(seconds: float) -> Callable[[], bool]:
    begun: list[float] = []

    def due() -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] >= seconds

    return due
