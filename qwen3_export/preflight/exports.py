"""Peak memory of quantizing and then writing an ONNX or GGUF, from shapes.

One process does both, so what quantizing leaves in memory stays: Python, libraries, compiled loops. On top of that, one
after the other, come

    matrix    the largest quantized matrix, a byte for each code, and packed; others go from file to file in pieces
    pieces    of rows, in every thread, that are rounded for a GGUF
    parts     of the ONNX that are open while level and cache are measured, as stored and as kernels want them
"""

from __future__ import annotations

import math

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.processors import thread_count
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.units import binary_size
from qwen3_export.errors import InputError

# Libraries of the formats: onnx and what writes it; onnxruntime; gguf. Measured, with what their first use allocates.
_ONNX_BYTES, _RUNTIME_BYTES, _GGUF_BYTES = 30 << 20, 50 << 20, 20 << 20
# Copies of a part's weights: as stored and packed, in two sessions that run beside each other where the part is small.
_COPIES, _SMALL_COPIES = 2.2, 4
# Bytes of a piece of rows on its way through rounding.
_PIECE_BYTES = 8 << 20


def export_peak(quantized: Checkpoint, name: str, left: int, threads: int | None = None) -> int | None:
    """Peak memory of an export in bytes; None where the format is a folder.

    `quantized` has the recipe's schemes, no codes; `left` are the bytes that quantizing leaves behind.
    """
    if name not in ("onnx", "onnx-standard", "gguf", "tensorrt"):
        return None
    if name == "gguf":
        return left + _GGUF_BYTES + max(_matrix(quantized), thread_count(threads) * _PIECE_BYTES)
    # The level is that of ONNX Runtime's own operators, by default one that rounds, which is measured.
    measured = _RUNTIME_BYTES + _parts(quantized) if name == "onnx" and quantized.schemes else 0
    return left + _ONNX_BYTES + max(_matrix(quantized), measured)


def check_export(needed: int | None, limit: int | None) -> None:
    """Raise InputError where an export needs more memory than `--memory` allows."""
    if needed is not None and limit is not None and needed > limit:
        raise InputError(
            f"writing it takes about {binary_size(needed)} of memory, --memory allows {binary_size(limit)}",
            "allow more; its largest matrix must fit, and what is measured",
        )


def _matrix(quantized: Checkpoint) -> int:
    """Codes of the largest quantized matrix, a byte each, and packed."""
    shapes = quantized.config.all_matrices()
    sizes = (math.prod(shapes[name]) * (8 + scheme.num_bits) // 8 for name, scheme in quantized.schemes.items())
    return max(sizes, default=0)


def _parts(quantized: Checkpoint) -> int:
    """The part of the ONNX whose weights take most, while they are measured."""
    from qwen3_export.run.graph_parts import PART_BYTES

    config, bits = quantized.config, {name: scheme.num_bits for name, scheme in quantized.schemes.items()}
    layers = [
        sum(math.prod(shape) * bits.get(f"{block_name(layer)}.{name}", 32) // 8 for name, shape in shapes.items())
        for layer, shapes in enumerate(map(config.linear_shapes, range(config.num_layers)))
    ]
    small = _SMALL_COPIES * min(PART_BYTES, sum(layers))
    head = min(PART_BYTES, 4 * config.vocab_size * config.hidden_size)
    return int(max(small, head, _COPIES * max(layers, default=0)))
