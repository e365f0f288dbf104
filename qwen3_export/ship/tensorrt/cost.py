"""Predicted memory and time of building a plan.

Both follow from the ONNX: its bytes of codes and scales, which the compiler works on once per profile, the bytes of its
linears in 16 bits, and those of an embedding and a head in 16 bits, which it hardly touches. The factors were measured
with TensorRT-RTX 1.7 on plans of 10 MB to 2.2 GB; see benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.core.memory import available_bytes
from qwen3_export.core.units import binary_size
from qwen3_export.errors import InputError, ResourceError

# Peak memory: the library; bytes held per byte of outer matrices and of linears in 16 bits; per quantized byte, once
# and for each profile.
_BASE_BYTES, _OUTER, _LINEAR, _QUANTIZED, _PER_PROFILE = 420 << 20, 1.45, 3.1, 4.4, 0.72
# Processor seconds: to start; per byte of linears in 16 bits; per quantized byte and profile.
_BASE_SECONDS, _LINEAR_SECONDS, _QUANTIZED_SECONDS = 1.0, 13e-9, 36e-9


@dataclass(frozen=True)
class BuildCost:
    """Peak memory of the builder's process in bytes, and its processor seconds."""

    peak_rss_bytes: int
    seconds: float


def build_cost(outer: int, linear: int, quantized: int, profiles: int) -> BuildCost:
    """Cost of building a plan, by its bytes.

    `outer` are those of embedding and head in 16 bits, `linear` of linears in 16 bits, `quantized` of codes and scales.
    """
    held = _OUTER * outer + _LINEAR * linear + (_QUANTIZED + _PER_PROFILE * profiles) * quantized
    seconds = _LINEAR_SECONDS * linear + _QUANTIZED_SECONDS * quantized * profiles
    return BuildCost(int(_BASE_BYTES + held), _BASE_SECONDS + seconds)


def check_memory(cost: BuildCost, limit: int | None = None) -> None:
    """Refuse a builder that needs more memory than `--memory` allows, or than is left.

    Raises InputError for the first, ResourceError for the second.
    """
    needed, left = cost.peak_rss_bytes, available_bytes()
    if limit is not None and needed > limit:
        raise InputError(
            f"building the plan takes about {binary_size(needed)} of memory, --memory allows {binary_size(limit)}",
            "allow more, or write the ONNX alone with --onnx-only",
        )
    if left is not None and needed > left:
        raise ResourceError(
            f"building the plan takes about {needed / 2**30:.2f} GiB of memory, {left / 2**30:.2f} GiB are left",
            "close other programs, build on a larger machine, or write the ONNX alone with --onnx-only",
        )
