"""Edits that break a folder of another tool."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import CheckpointError
from tests.conftest import tiny_config, write_checkpoint
from tests.reference import packers
from tests.unit.core.checkpoints import Q_PROJ, Tensors

WIDE = tiny_config(hidden_size=128, intermediate_size=256)
Edit = Callable[[dict[str, Any], Tensors], object]


def refuses(folder: packers.Folder, edit: Edit, message: str, config: dict[str, Any] | None = None) -> None:
    """After `edit(quantization_config, tensors)` the folder is refused, or else its linear."""
    values = json.loads((folder.path / "config.json").read_text())
    edit(values["quantization_config"], folder.tensors)
    write_checkpoint(folder.path, values, folder.tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder.path).linear(Q_PROJ)
    assert str(folder.path) in str(caught.value)


def put(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Change one tensor of the first linear."""
    name = f"{Q_PROJ}.{part}"
    return lambda _, tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def add(name: str, array: Any) -> Edit:
    return lambda _, tensors: tensors.update({name: np.asarray(array)})


def drop(part: str) -> Edit:
    return lambda _, tensors: tensors.pop(f"{Q_PROJ}.{part}")


def say(**values: Any) -> Edit:
    return lambda config, _: config.update(values)
