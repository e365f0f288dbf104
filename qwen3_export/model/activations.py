"""Activation quantization: a linear's inputs rounded to 8 or 4 bits, done in floats.

    dynamic-token   scale = max|x| / 448 (E4M3) or / 127.5 (int8), one per token
    dynamic-group   the same, one per 128 inputs of a token
    static-tensor   scale = input_scale, one for all tokens, from calibration
    dynamic-group   beside NVFP4 weights: scale = E4M3(max|x| / 6 / input_scale) · input_scale, one per 16 inputs

    x → clamp(round(x / scale)) · scale

The divisors are those of compressed-tensors, whose layout we write; vLLM divides by 127. The last line is TensorRT's
dynamic double quantization: the scales are quantized too, by one number from calibration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3_export.core.scheme import ACTIVATION_GROUP, NVFP4_GROUP, QuantScheme

LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
# In place of a scale that E4M3 rounds to 0: any number will do, since its inputs are rounded to 0 beside it.
_SCALE_OF_ZEROS = 0.125
_HALF_RANGE_INT8 = 127.5


def largest_unit(scheme: QuantScheme) -> float:
    """The largest rounded input in units of the scale."""
    return LARGEST_E4M3 if scheme.type == "float" else _HALF_RANGE_INT8


def rounder(scheme: QuantScheme, input_scale: float | None) -> Callable[[Tensor], Tensor]:
    """The function that rounds fp32 inputs `[…, in]` as the scheme says."""
    if scheme.activations == "static-tensor":
        assert input_scale is not None
        fixed = torch.tensor(input_scale)
        return lambda x: _round(x, fixed.to(x.device), scheme)
    if scheme.activations == "dynamic-token":
        return lambda x: _round(x, _scale(x, scheme), scheme)
    if scheme.num_bits == 4:
        assert input_scale is not None
        divisor = torch.tensor(1 / input_scale)
        return lambda x: _round_nvfp4(x, divisor.to(x.device))

    def by_group(x: Tensor) -> Tensor:
        groups = x.reshape(*x.shape[:-1], -1, ACTIVATION_GROUP)
        return _round(groups, _scale(groups, scheme), scheme).flatten(-2)

    return by_group


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers in fp32, ties to even, saturating at 448.

    This works on the bits, because a conversion to float8 and back takes several times as long on a CPU.
    """
    x = x.clamp(-LARGEST_E4M3, LARGEST_E4M3)
    bits = x.view(torch.int32)
    # Round 23 bits of mantissa to 3: add half a unit, less one when the last bit that stays is even.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).view(torch.float32)
    return torch.where(x.abs() < 2.0**-6, torch.round(x * 512) / 512, normal)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 numbers in fp32, ties to even, saturating at 6."""
    x = x.clamp(-LARGEST_E2M1, LARGEST_E2M1)
    size = x.abs()
    # The distance of two neighbours is 0.5 below 2, 1 below 4, and 2 from there on.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(x / step).mul_(step)


def _round_nvfp4(x: Tensor, divisor: Tensor) -> Tensor:
    """Inputs rounded to E2M1, and the scales of 16 times `divisor` to E4M3."""
    groups = x.reshape(*x.shape[:-1], -1, NVFP4_GROUP)
    stored = round_e4m3(groups.abs().amax(-1, keepdim=True) / LARGEST_E2M1 * divisor)
    scale = torch.where(stored == 0, _SCALE_OF_ZEROS, stored) / divisor
    return round_e2m1(groups / scale).mul_(scale).flatten(-2)


def _scale(x: Tensor, scheme: QuantScheme) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / largest_unit(scheme)
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)


def _round(x: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    units = x / scale
    if scheme.type == "int":
        return units.round_().clamp_(-128, 127).mul_(scale)
    return round_e4m3(units).mul_(scale)
