"""Predicted memory and time of building a plan.

Both follow from the ONNX: its layers, whose nodes the compiler works on once per profile, however narrow they are; its
bytes of codes and scales, worked on once per profile too; the bytes of its linears in 16 bits; and those of an
embedding and a head in 16 bits, which it hardly touches. The factors are a least-squares fit of relative errors to
builds with TensorRT-RTX 1.7 of 2 to 60 layers, ONNX files of 1 MB to 2.2 GB; see benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.core.memory import available_bytes
from qwen3_export.core.units import binary_size
from qwen3_export.errors import InputError, ResourceError

# Peak memory: the library; for each layer, once and for each profile; bytes held per byte of outer matrices and of
# linears in 16 bits; per quantized byte, once and for each profile.
_BASE_BYTES, _LAYER_BYTES, _LAYER_PER_PROFILE = 300e6, 13.0e6, 0.4e6
_OUTER, _LINEAR, _QUANTIZED, _PER_PROFILE = 1.9, 2.7, 2.55, 0.7
# Processor seconds: to start; per layer and profile, and per pair of layers; per byte of linears in 16 bits; per
# quantized byte and profile.
_BASE_SECONDS, _LAYER_SECONDS, _PAIR_SECONDS = 0.55, 0.1, 0.0043
_LINEAR_SECONDS, _QUANTIZED_SECONDS = 5.4e-9, 9.7e-9


@dataclass(frozen=True)
class BuildCost:
    """Peak memory of the builder's process in bytes, and its processor seconds."""

    peak_rss_bytes: int
    seconds: float


def build_cost(outer: int, linear: int, quantized: int, profiles: int, layers: int) -> BuildCost:
    """Cost of building a plan, by its bytes and layers.

    `outer` are those of embedding and head in 16 bits, `linear` of linears in 16 bits, `quantized` of codes and scales.
    """
    held = (_LAYER_BYTES + _LAYER_PER_PROFILE * profiles) * layers
    held += _OUTER * outer + _LINEAR * linear + (_QUANTIZED + _PER_PROFILE * profiles) * quantized
    seconds = (_LAYER_SECONDS + _PAIR_SECONDS * layers) * layers * profiles
    seconds += _LINEAR_SECONDS * linear + _QUANTIZED_SECONDS * quantized * profiles
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
