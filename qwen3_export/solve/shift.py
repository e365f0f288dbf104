"""The target shift: quantize not W, but the weight that repairs what the layers before have broken.

    min over W′ of ‖X W′ᵀ − X̃ Wᵀ − (R̃ − R)‖² + λ‖W′ − W‖²
    W′ = W + α (W·drift + residual)(H + λI)⁻¹

X are the inputs in the quantized model, X̃ in the original; R̃ − R only for the linears that write to
the residual stream. In aim this is GPTAQ (Li et al. 2025). The full step fits the calibration text,
so it is shortened to what held-out calibration rows confirm: their error is a parabola in α, and the
α in [0, 1] that minimises it is taken, for each linear. With fewer than eight rows none is held out,
and nothing is shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.model.workers import Workers
from qwen3_export.solve.moments import Moments

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Shift:
    """What all linears with the same inputs share: moments, and the Cholesky factor of H + λI."""

    fitted: Moments
    held_out: Moments
    lower: Tensor

    def target(self, weight: Tensor, pool: Workers) -> Tensor:
        """The weight `[out, in]` to quantize in place of `weight`."""
        pieces = [slice(i, min(i + ROWS_AT_ONCE, len(weight))) for i in range(0, len(weight), ROWS_AT_ONCE)]
        parts = pool.map(lambda rows: self._step(weight, rows), pieces)
        confirmed, curvature = (sum(part[i] for part in parts) for i in (1, 2))
        alpha = min(max(confirmed / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        return weight + alpha * torch.cat([part[0] for part in parts])

    def _step(self, weight: Tensor, rows: slice) -> tuple[Tensor, float, float]:
        """The full step of some output rows, and their share of the held-out parabola."""
        step = torch.cholesky_solve(_missing(weight, rows, self.fitted).T, self.lower).T
        confirmed = (step * _missing(weight, rows, self.held_out)).double().sum()
        curvature = ((step @ self.held_out.hessian) * step).double().sum()
        return step, float(confirmed), float(curvature)


def prepare(fitted: Moments, held_out: Moments, damping: Tensor) -> Shift | None:
    """Factorise once for a group of linears; None when nothing is held out or H is not definite.

    `damping` `[in]` is added to the Hessian's diagonal.
    """
    if held_out.tokens == 0:
        return None
    lower, failed = torch.linalg.cholesky_ex(fitted.hessian + torch.diag(damping))
    return None if failed else Shift(fitted, held_out, lower)


def _missing(weight: Tensor, rows: slice, moments: Moments) -> Tensor:
    """`W·drift + residual`: the missing output's correlation with the inputs, `[rows, in]`."""
    assert moments.drift is not None
    missing = weight[rows] @ moments.drift
    return missing if moments.residual is None else missing + moments.residual[rows]
