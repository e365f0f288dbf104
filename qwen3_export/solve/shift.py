"""The target shift: quantize not W, but the weight that repairs what the layers before have broken.

    min over W′ of ‖X W′ᵀ − X̃ Wᵀ − (R̃ − R)‖² + λ‖W′ − W‖²
    W′ = W + (W·drift + residual)(H + λI)⁻¹

X are the inputs in the quantized model, X̃ in the original; R̃ − R only for the linears that write to
the residual stream. In aim this is GPTAQ (Li et al. 2025). It fits the calibration text, so the step
is shortened to what held-out calibration rows confirm: the factor α ∈ [0, 1] that minimises their
error, which is a parabola in α.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_export.solve.moments import Moments


def shifted(weight: Tensor, fitted: Moments, held_out: Moments, damping: float) -> tuple[Tensor, float]:
    """The new target `[out, in]` and the α that was taken; `damping` is a share of the mean diagonal."""
    step = _step(weight, fitted, damping)
    wanted = _wanted(weight, held_out)
    confirmed = float((step * wanted).double().sum())
    curvature = float(((step @ held_out.hessian) * step).double().sum())
    alpha = min(max(confirmed / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    if alpha == 0.0:
        return weight, 0.0
    return weight + alpha * _step(weight, fitted.join(held_out), damping), alpha


def _wanted(weight: Tensor, moments: Moments) -> Tensor:
    """`W·drift + residual`: the correlation of the missing output with the inputs, `[out, in]`."""
    assert moments.drift is not None
    wanted = weight @ moments.drift
    return wanted if moments.residual is None else wanted + moments.residual


def _step(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    damped = moments.hessian.clone()
    diagonal = damped.diagonal()
    extra = damping * diagonal.mean()
    diagonal.add_(torch.where(diagonal == 0, torch.ones_like(diagonal), extra))
    lower = torch.linalg.cholesky(damped.double())
    return torch.cholesky_solve(_wanted(weight, moments).double().T, lower).T.float()
