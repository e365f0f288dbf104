"""Size of an ONNX folder's weights, from shapes and schemes alone."""

from __future__ import annotations

import math

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx.graph import ALIGNMENT

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# The graph itself: nodes, names and small constants per block and in all, measured.
_GRAPH_BYTES, _BLOCK_BYTES = 12 << 10, 7 << 10


def planned_bytes(checkpoint: Checkpoint, precision: str = "fp32") -> int:
    """Bytes of `model.onnx`, its data and the sidecars that an export would write."""
    config = checkpoint.config
    sidecars = sum(path.stat().st_size for path in checkpoint.sidecars())
    graph = _GRAPH_BYTES + _BLOCK_BYTES * config.num_layers
    return weight_bytes(checkpoint, precision) + graph + sidecars


def weight_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Bytes of the data file.

    Codes, scales in the activations' type, and what stays in 16 bits, each on its own page.
    """
    matrices, total = checkpoint.config.all_matrices(), 0
    for name, shape in checkpoint.config.tensor_shapes().items():
        module = name.removesuffix(".weight")
        if module in checkpoint.schemes:
            parts = _quantized(checkpoint.schemes[module], matrices[module], _BYTES[precision])
            total += sum(map(_on_pages, parts))
            continue
        stored = checkpoint.entry(name).dtype.itemsize
        # Under fp32 activations a 16-bit matrix is stored as it came.
        kept = stored if precision == "fp32" and stored == 2 and len(shape) == 2 else _BYTES[precision]
        total += _on_pages(math.prod(shape) * kept)
    return total


def quantized_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Bytes of the data file that are codes, scales and zero points."""
    shapes = checkpoint.config.all_matrices()
    parts = (_quantized(scheme, shapes[name], _BYTES[precision]) for name, scheme in checkpoint.schemes.items())
    return sum(_on_pages(part) for each in parts for part in each)


def _on_pages(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _quantized(scheme: QuantScheme, shape: tuple[int, int], scale_bytes: int) -> tuple[int, int, int]:
    """Bytes of codes, scales and zero points."""
    grid = scheme.grid(shape)
    zeros = 0 if scheme.symmetric else grid[0] * math.ceil(grid[1] * scheme.num_bits / 8)
    return math.prod(shape) * scheme.num_bits // 8, math.prod(grid) * scale_bytes, zeros
