"""What building a plan takes: memory and time.

Both are predicted from the size of its ONNX.

Measured with TensorRT-RTX 1.7, from the reference model to the shape of Qwen3-0.6B; see docs/nvidia.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.core.memory import available_bytes
from qwen3_export.errors import ResourceError

# The library itself, and bytes held for each byte of weights; seconds to start, and for each GB.
_BASE_BYTES, _FACTOR = 600 << 20, 3.6
_BASE_SECONDS, _SECONDS_PER_BYTE = 4.0, 6e-9


@dataclass(frozen=True)
class BuildCost:
    """Peak memory of the builder's process in bytes, and its time in seconds."""

    peak_rss_bytes: int
    seconds: float


def build_cost(weight_bytes: int) -> BuildCost:
    """The cost of a plan whose ONNX has so many bytes of weights."""
    return BuildCost(int(_BASE_BYTES + _FACTOR * weight_bytes), _BASE_SECONDS + _SECONDS_PER_BYTE * weight_bytes)


def check_memory(weight_bytes: int) -> None:
    """Raise ResourceError when the machine has less memory left than the builder takes."""
    needed, left = build_cost(weight_bytes).peak_rss_bytes, available_bytes()
    if left is not None and needed > left:
        raise ResourceError(
            f"building the plan takes about {needed / 2**30:.2f} GiB of memory, {left / 2**30:.2f} GiB are left",
            "close other programs, build on a larger machine, or write the ONNX alone with --onnx-only",
        )
