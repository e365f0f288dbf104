"""What several tests ask of a TensorRT plan and of its export."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.errors import ExportError
from qwen3_export.ship.tensorrt import export_tensorrt
from tests.artifact.support import load_graph


def header(plan: Path) -> dict[str, Any]:
    """The fields of a TensorRT-RTX 1.7 plan's first 64 bytes that are known."""
    values = struct.unpack("<4sIQQ4B4sQQQQ", plan.read_bytes()[:64])
    magic, _, _, size, *version, again, mask, _, _, weights = values
    return {"magic": (magic, again), "size": size, "version": version, "mask": mask, "weights": weights}


def onnx_weight_bytes(folder: Path) -> int:
    total = 0
    for tensor in load_graph(folder).graph.initializer:
        places = {item.key: item.value for item in tensor.external_data}
        total += int(places["length"]) if places else len(tensor.raw_data)
    return total


def refused(checkpoint: Checkpoint, tmp_path: Path, error: type[ExportError], match: str, **options: Any) -> None:
    """The request raises, and nothing is written."""
    with pytest.raises(error, match=match) as caught:
        export_tensorrt(checkpoint, tmp_path / "out" / "trt", **options)
    assert not list((tmp_path / "out").glob("*"))
    assert caught.type is error
