"""Tokenizer, template and generation files: what the tokenizers library and jinja meet in them."""

from __future__ import annotations

from random import Random

from tests.hostile.damage import change_json_file
from tests.hostile.trial import Place, Trial

_FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def make(random: Random, place: Place) -> Trial:
    """A folder with a damaged tokenizer, and a command that reads text with it."""
    folder = place.copy(random.choice(("model", "onnx")))
    what = change_json_file(random, folder / random.choice(_FILES))
    if folder.name == "onnx" or random.random() < 0.3:
        return Trial(what, ("run", folder, "--prompt", "Hello, ocean.", "--max-new-tokens", "2"))
    command: tuple[object, ...] = random.choice(
        (
            ("gguf", folder),
            ("onnx", folder),
            ("reference", folder, "--tokens", "64", "--window", "32"),
            ("quantize", folder, "--recipe", "gptq-w4a16-g32", "--samples", "2", "--sequence-length", "16"),
        )
    )
    return Trial(what, (*command, "--output", place.out), outputs=(place.out,))
