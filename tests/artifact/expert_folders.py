"""Mixtures of experts, rounded and exported to ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import random_ids, round_to_nearest
from tests.conftest import tiny_moe_config

WIDE = tiny_moe_config(hidden_size=256, moe_intermediate_size=256, num_experts=4)
IDS = [random_ids(60), random_ids(1)]


def with_experts(folder: Path, scheme: QuantScheme, tmp_path: Path) -> Checkpoint:
    return round_to_nearest(folder, tmp_path / "quantized", ("*.experts.*", scheme))


def export(checkpoint: Checkpoint, output: Path, flavor: str | None = "ort", **options: Any) -> list[dict[str, Any]]:
    """The layers' operators, which result and manifest must tell alike."""
    result = export_onnx(checkpoint, output, flavor, **options)
    manifest = json.loads((output / "qwen3-export.json").read_text())
    assert manifest["expert_layers"] == result["expert_layers"]
    return result["expert_layers"]
