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

from qwen3_export.core.files import read_sidecar
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.errors import CheckpointError

Summary = dict[str, Any]
# Where a GGUF file keeps the summary, as JSON: it has no manifest beside it.
GGUF_KEY = "qwen3_export.experts"
# Where other families' config.json have the number of experts: Qwen's others, Mixtral's and Llama 4's, DeepSeek's.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
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

    Without a manifest, config.json tells whether there are experts at all. It may be any model's, since other tools'
    artifacts are measured too.
    """
    manifest = read_manifest(folder)
    if "experts" in manifest:
        return summary_of(manifest["experts"])
    config = read_sidecar(folder / "config.json")
    return None if config and not _has_experts(config) else dict(UNKNOWN)


def _has_experts(config: dict[str, Any]) -> bool:
    try:
        return bool(parse_config(config, "config.json").sparse_layers)
    except CheckpointError:
        return any(config.get(key) for key in _COUNTS)
