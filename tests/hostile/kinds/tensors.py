"""Safetensors files with damaged headers and bodies, and wrong indices."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.damage import change_bytes, change_json, commands, dump_json, replace_file
from tests.hostile.trial import Place, Trial


def make(random: Random, place: Place) -> Trial:
    """A folder with a damaged weight file."""
    name = random.choice(("model", "moe", "quantized"))
    folder = place.copy(name)
    files = sorted(folder.glob("*.safetensors"))
    path, roll = random.choice(files), random.random()
    if roll < 0.4:
        what = change_bytes(random, path, first=2048)
    elif roll < 0.5:
        what = change_bytes(random, path)
    elif roll < 0.6:
        what = replace_file(random, path)
    elif roll < 0.75 and name == "quantized":
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        what = change_json(random, values)
        index.write_bytes(dump_json(values))
    else:
        what = _header(random, path)
    command, outputs = commands(random, folder, place.out, quantized=name == "quantized")
    # Damaged weights that are still finite give other results, not errors.
    return Trial(f"{name}: {what}", command, outputs=outputs)


def _header(random: Random, path: Path) -> str:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    what = change_json(random, header)
    text = dump_json(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header {what}"
