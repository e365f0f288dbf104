"""How many calibration tokens reached the experts of a sparse model.

    quantize   counts them, {"model.layers.N": [tokens of expert 0, …]}, in the folder's manifest
    exports    carry the summary along: {min_tokens, below_floor, floor, fallback}
    validate   holds it against a gate's limits

The summary is None for a model without experts. Its values are None when no calibration text ran through the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_json
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.qwen3 import parse_config

Summary = dict[str, Any]
# Where a GGUF file keeps the summary, as JSON: it has no manifest beside it.
GGUF_KEY = "qwen3_export.experts"
UNKNOWN: Summary = dict.fromkeys(("min_tokens", "below_floor", "floor", "fallback"))


def summarise(tokens: Mapping[str, list[int]], floor: int, fallback: str) -> Summary | None:
    """Fewest tokens of any expert, and the number of experts below `floor`."""
    counts = [count for layer in tokens.values() for count in layer]
    if not counts:
        return None
    below = sum(count < floor for count in counts)
    return {"min_tokens": min(counts), "below_floor": below, "floor": floor, "fallback": fallback}


def summary_of(values: object) -> Summary | None:
    """The summary in a manifest's `experts`, without the counts of single experts.

    It is None for None. For anything that is not an object all values are unknown.
    """
    if values is None:
        return None
    known = values if isinstance(values, Mapping) else {}
    return {key: known.get(key) for key in UNKNOWN}


def read_coverage(folder: Path) -> Summary | None:
    """The summary of an artifact folder, from its manifest.

    Without a manifest, config.json tells whether there are experts at all.
    """
    manifest = read_manifest(folder)
    if "experts" in manifest:
        return summary_of(manifest["experts"])
    config = folder / "config.json"
    if config.is_file() and not parse_config(read_json(config), str(config)).sparse_layers:
        return None
    return dict(UNKNOWN)
