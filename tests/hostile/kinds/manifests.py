"""Our own files, damaged: qwen3-export.json, reference headers, genai and engine files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

from tests.hostile.damage import change_json, change_json_file, commands, dump_json
from tests.hostile.trial import Place, Trial

_RUN = ("--prompt", "hi", "--max-new-tokens", "2")


def make(random: Random, place: Place) -> Trial:
    """An artifact whose own description is damaged."""
    kind = random.choice(("quantized", "quantized", "onnx", "reference"))
    path = place.copy(kind)
    if kind == "reference":
        what = _reference(random, path)
        commands_of = (("validate", place.base("onnx"), "--reference", path), ("inspect", path))
        return Trial(what, random.choice(commands_of))
    if kind == "quantized":
        what = change_json_file(random, path / "qwen3-export.json")
        command, outputs = commands(random, path, place.out, quantized=True)
        return Trial(what, command, outputs=outputs)
    there = [name for name in ("qwen3-export.json", "genai_config.json", "config.json") if (path / name).is_file()]
    what = change_json_file(random, path / random.choice(there))
    command = random.choice(
        (("run", path, *_RUN), ("validate", path, "--reference", place.base("reference")), ("inspect", path))
    )
    return Trial(what, command)


def _reference(random: Random, path: Path) -> str:
    """Damage a reference file: its header's metadata, which holds JSON, or its tensors."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if metadata and random.random() < 0.6:
        key = random.choice(sorted(metadata))
        metadata[key] = random.choice(
            ("", "x", "[]", "{}", "null", "-1", "1e400", "9" * 5000, "[" * 20_000, metadata[key] * 2)
        )
        what = f"reference: {key} is {metadata[key][:20]!r}"
    else:
        what = f"reference: {change_json(random, header)}"
    text = dump_json(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return what
