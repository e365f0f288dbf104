"""Predicted memory and time of building a plan.

Both follow from the ONNX: its bytes of codes and scales, which the compiler works on once per profile, and its bytes
in 16 bits. The factors were measured with TensorRT-RTX 1.7 on one core of a Xeon; see benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.core.memory import available_bytes
from qwen3_export.errors import ResourceError

# Peak memory: the library; bytes held per byte in 16 bits; per quantized byte, once and for each profile.
_BASE_BYTES, _PLAIN, _QUANTIZED, _PER_PROFILE = 430 << 20, 2.0, 3.45, 0.72
# Seconds: to start; per byte in 16 bits; per quantized byte and profile.
_BASE_SECONDS, _PLAIN_SECONDS, _QUANTIZED_SECONDS = 2.0, 2.3e-9, 34e-9


@dataclass(frozen=True)
class BuildCost:
    """Peak memory of the builder's process in bytes, and its processor seconds."""

    peak_rss_bytes: int
    seconds: float


def build_cost(plain: int, quantized: int, profiles: int) -> BuildCost:
    """Cost of a plan with `plain` bytes of 16-bit weights and `quantized` bytes."""
    held = _PLAIN * plain + (_QUANTIZED + _PER_PROFILE * profiles) * quantized
    seconds = _PLAIN_SECONDS * plain + _QUANTIZED_SECONDS * quantized * profiles
    return BuildCost(int(_BASE_BYTES + held), _BASE_SECONDS + seconds)


def check_memory(cost: BuildCost) -> None:
    """Raise ResourceError when the builder needs more memory than is left."""
    needed, left = cost.peak_rss_bytes, available_bytes()
    if left is not None and needed > left:
        raise ResourceError(
            f"building the plan takes about {needed / 2**30:.2f} GiB of memory, {left / 2**30:.2f} GiB are left",
            "close other programs, build on a larger machine, or write the ONNX alone with --onnx-only",
        )
