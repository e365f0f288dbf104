"""Schemes that TensorRT-RTX can hold, and the compute capabilities that run them.

A plan of each kind was built with version 1.7.

weights                                 from
int4, int8, per channel or in groups    8.0 (int8 per channel 7.5)
FP8 E4M3, every strategy                8.9
FP4 E2M1: MXFP4; NVFP4, inputs too      12.0
bf16                                    8.0
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx import qdq

DEFAULT = ("8.6", "8.9", "12.0")
_GROUPS = (16, 32, 64, 128)


def supports(scheme: QuantScheme) -> str | None:
    """Why TensorRT cannot hold a scheme, or None when it can."""
    if reason := qdq.supports(scheme):
        return reason
    if scheme.signed_scales:
        return "TensorRT takes no negative scales: leave signed_scales off"
    if not scheme.symmetric:
        return "TensorRT takes no zero points"
    if scheme.strategy == "group" and scheme.group_size not in _GROUPS:
        return f"TensorRT takes blocks of 16, 32, 64 or 128, not {scheme.group_size}"
    if scheme.strategy == "block" and scheme.block_shape is not None and scheme.block_shape[1] not in _GROUPS:
        return f"TensorRT takes blocks of 16, 32, 64 or 128 inputs, not {scheme.block_shape[1]}"
    return None


def least_capability(scheme: QuantScheme) -> str:
    """The lowest compute capability whose kernels read a scheme's weights."""
    if scheme.type == "float":
        return "8.9" if scheme.num_bits == 8 else "12.0"
    return "8.0"


def too_old(schemes: Iterable[QuantScheme], precision: str, capabilities: Iterable[str]) -> str | None:
    """Why the oldest capability cannot run a model, or None when it can."""
    oldest = min(capabilities, key=_number)
    for scheme in sorted(set(schemes), key=lambda scheme: scheme.label):
        if _number(least := least_capability(scheme)) > _number(oldest):
            return f"--sm {oldest} has no kernels for {scheme.label}, which needs {least} or later"
    if precision == "bf16" and _number(oldest) < 8:
        return f"--sm {oldest} has no kernels for bf16, which needs 8.0 or later"
    return None


def fitting(schemes: Iterable[QuantScheme], capabilities: Iterable[str]) -> tuple[str, ...]:
    """The capabilities that can run every scheme."""
    chosen, kept = list(schemes), []
    for name in capabilities:
        if all(_number(least_capability(scheme)) <= _number(name) for scheme in chosen):
            kept.append(name)
    return tuple(kept)


def _number(capability: str) -> float:
    return float(capability)
