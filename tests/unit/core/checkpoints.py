"""What several tests of checkpoint folders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.errors import CheckpointError

Q_PROJ = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, np.ndarray]


def refuses(folder: Path, message: str) -> str | None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return caught.value.hint


def assert_holds(checkpoint: Checkpoint, tensors: Tensors) -> None:
    for name, wanted in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == wanted.dtype
        assert found.tobytes() == wanted.tobytes()
