"""The graph that genai_config.json names; onnxruntime-genai opens no other.

model.decoder.filename    the decoder's graph, below the folder
model.decoder.…           its inputs, outputs and sizes
search.…                  whether its cache is written in place
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_sidecar

GENAI = "genai_config.json"


def read_genai(folder: Path) -> dict[str, Any]:
    """The contents, empty where there is no such file; CheckpointError when it is broken."""
    return read_sidecar(folder / GENAI)


def inner(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The object below some keys, empty where there is none."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def stated_name(values: Mapping[str, Any]) -> object:
    """What stands there as the decoder's graph, None where nothing does."""
    return inner(values, "model", "decoder").get("filename")


def stated_graph(folder: Path, values: Mapping[str, Any] | None = None) -> Path | None:
    """The graph that genai_config.json names; None where the folder has no such file."""
    name = stated_name(read_genai(folder) if values is None else values)
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    return folder / name if os.path.isfile(folder / name) else None
