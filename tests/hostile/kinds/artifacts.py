"""GGUF files and ONNX folders with damaged bytes or missing parts."""

from __future__ import annotations

from random import Random

from tests.hostile.damage import change_bytes, replace_file
from tests.hostile.trial import Place, Trial

_RUN = ("--prompt", "hi", "--max-new-tokens", "2")


def make(random: Random, place: Place) -> Trial:
    """A damaged artifact, and a command that runs it."""
    kind = random.choice(("onnx", "gguf"))
    path = place.copy(kind)
    if kind == "gguf":
        what = change_bytes(random, path, first=random.choice((64, 4096, None)))
    else:
        part = path / random.choice(("model.onnx", "model.onnx", "model.onnx.data", "tokenizer.json"))
        what = replace_file(random, part) if random.random() < 0.15 else change_bytes(random, part)
    command: tuple[object, ...] = random.choice(
        (
            ("run", path, *_RUN),
            ("validate", path, "--reference", place.base("reference")),
            ("bench", path, "--prompt-tokens", "8", "--new-tokens", "1", "--repeat", "1"),
            ("inspect", path),
            ("triton", path, "--output", place.out),
        )
    )
    outputs = (place.out,) if command[0] == "triton" else ()
    # A graph may ask for a kernel that does not exist, which is reported as a missing library (exit code 3).
    return Trial(what, command, frozenset({0, 2, 3}), outputs=outputs)
