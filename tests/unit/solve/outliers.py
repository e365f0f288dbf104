"""Checkpoints with outlier channels that compute the same function as those without."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.resources import resource
from qwen3_export.model.decoder import load_block
from qwen3_export.solve.blocks.fold import apply_fold, fold_sites
from tests.artifact.support import with_tokenizer
from tests.conftest import write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


def with_outliers(checkpoint: Checkpoint, folder: Path) -> Path:
    """The same function, with every ninth channel of the norms times 64."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.files}
    for layer in range(checkpoint.config.num_layers):
        block = load_block(checkpoint, layer)
        for site in (site for site in fold_sites(block) if site.is_norm):
            scales = torch.ones(len(site.index))
            scales[::9] = 2.0**-6
            apply_fold(block, site, scales, BF16)
        tensors |= {
            f"{block_name(layer)}.{name}.weight": weight.numpy().astype(BF16) for name, weight in block.weights.items()
        }
    write_checkpoint(folder, dict(checkpoint.raw_config), tensors)
    return with_tokenizer(folder, resource("calibration") / "reference-model")
