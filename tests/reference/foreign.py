"""What several tests ask of a folder that another tool quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.model.decoder import load_block
from tests.conftest import tiny_config
from tests.reference import packers
from tests.reference.models import assert_same_logits, dequantized

WIDE = tiny_config(hidden_size=128, intermediate_size=256)
ALL = 14


def labels(folder: Path) -> set[str]:
    return {scheme.label for scheme in open_checkpoint(folder).schemes.values()}


def assert_means(folder: packers.Folder, config: dict[str, Any] | None = None) -> None:
    """Every weight is its owner's, and so are the logits of transformers' own forward pass."""
    found = dequantized(folder.path)
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, folder.weights[name], name)
    if not any(scheme.activations for scheme in open_checkpoint(folder.path).schemes.values()):
        assert_same_logits(folder.path, folder.dense(config))


def our_linears(folder: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, random inputs and our outputs of every linear of the first block."""
    checkpoint, random, found = open_checkpoint(folder), torch.Generator().manual_seed(0), []
    block = load_block(checkpoint, 0)
    for name, (_, inputs) in checkpoint.config.linear_shapes(0).items():
        x = torch.randn(5, inputs, generator=random)
        rounder = block.rounders.get(name, lambda x: x)
        found.append((f"model.layers.0.{name}", x, rounder(x) @ block.weights[name].T))
    return found
