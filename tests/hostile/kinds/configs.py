"""config.json with values of other types and sizes, or replaced, absent or endless."""

from __future__ import annotations

from random import Random

from tests.hostile.damage import change_json_file, commands
from tests.hostile.trial import Place, Trial


def make(random: Random, place: Place) -> Trial:
    """A folder with a damaged configuration."""
    name = random.choice(("model", "model", "moe", "quantized"))
    folder = place.copy(name)
    what = change_json_file(random, folder / "config.json")
    command, outputs = commands(random, folder, place.out, quantized=name == "quantized")
    return Trial(f"{name}: {what}", command, outputs=outputs)
