"""Memory and time that building a plan takes.

Both are predicted from the size of its ONNX: bytes of codes and scales, which the compiler works on once for each
profile, and bytes that stay in 16 bits. Measured with TensorRT-RTX 1.7, processor seconds on one core of a Xeon; the
figures stand in benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.core.memory import available_bytes
from qwen3_export.errors import ResourceError

# Peak memory: the library, bytes held for each in 16 bits, and for each quantized one, without and per profile.
_BASE_BYTES, _PLAIN, _QUANTIZED, _PER_PROFILE = 430 << 20, 2.0, 3.45, 0.72
# Seconds: to start, for a byte in 16 bits, for a quantized byte per profile.
_BASE_SECONDS, _PLAIN_SECONDS, _QUANTIZED_SECONDS = 2.0, 2.3e-9, 34e-9


@dataclass(frozen=True)
class BuildCost:
    """Peak memory of the builder's process in bytes, and its processor seconds."""

    peak_rss_bytes: int
    seconds: float


def build_cost(plain: int, quantized: int, profiles: int) -> BuildCost:
    """The cost of a plan with `plain` bytes in 16 bits and `quantized` bytes."""
    held = _PLAIN * plain + (_QUANTIZED + _PER_PROFILE * profiles) * quantized
    seconds = _PLAIN_SECONDS * plain + _QUANTIZED_SECONDS * quantized * profiles
    return BuildCost(int(_BASE_BYTES + held), _BASE_SECONDS + seconds)


def check_memory(cost: BuildCost) -> None:
    """Raise ResourceError when the machine has less memory left than the builder takes."""
    needed, left = cost.peak_rss_bytes, available_bytes()
    if left is not None and needed > left:
        raise ResourceError(
            f"building the plan takes about {needed / 2**30:.2f} GiB of memory, {left / 2**30:.2f} GiB are left",
            "close other programs, build on a larger machine, or write the ONNX alone with --onnx-only",
        )
