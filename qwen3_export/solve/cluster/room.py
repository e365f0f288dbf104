"""Disk space that the pieces of one block take on the shared path."""

from __future__ import annotations

import math

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.qwen3 import Qwen3Config

# Bytes per weight of codes with their scales and zero points.
_CODES = 1.25


def pieces_bytes(config: Qwen3Config, original: bool) -> int:
    """Bytes of the largest block's pieces; see `solve.cluster`.

    Each group of linears leaves the upper half of its Hessian, and its codes. Where the `original` model runs beside,
    there are three such halves, drift or target for two sets of samples, and the shift of the weights. Experts leave
    only codes.
    """
    return max(_block_bytes(config, layer, original) for layer in range(config.num_layers))


def _block_bytes(config: Qwen3Config, layer: int, original: bool) -> int:
    shapes, total = config.linear_shapes(layer), 0.0
    for stage in config.block(layer).stages:
        for group in stage.groups:
            weights = sum(math.prod(shapes[name]) for name in group)
            total += _CODES * weights
            if not is_expert(group[0]):
                width = shapes[group[0]][1]
                square = width * width
                total += 4 * square / 2 * (3 if original else 1)
                aim = weights if stage.writes_residual else 2 * square
                total += 4 * (2 * aim + weights) if original else 0
    return int(total)
