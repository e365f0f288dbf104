"""The target shift: quantize a weight that compensates errors of earlier layers.

W′ takes the place of W as the weight to be quantized.

    min over W′ of ‖X W′ᵀ − X̃ Wᵀ − (R̃ − R)‖² + λ‖W′ − W‖²
    W′ = W + α (W·drift)(H + λI)⁻¹       or, for a linear that writes to the residual stream,
    W′ = W + α (target − W H)(H + λI)⁻¹     target = mean (X̃ Wᵀ + R̃ − R) xᵀ

X are the inputs in the quantized model, X̃ those in the original. R and R̃ are the residual streams that the output is
added to, and count only for linears that write there. For these, X̃ Wᵀ + R̃ is the original's residual stream after the
layer, so that the moments of X̃, which are several times as large, are not needed. The aim is that of GPTAQ (Li et al.
2025).

The full step overfits the calibration text, so it is shortened by a factor α in [0, 1]. The error of held-out
calibration samples is a parabola in α, whose minimum is taken for each linear. The step itself is then computed again
from all samples. With fewer than eight samples none is held out, and nothing is shifted.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3_export.model.threads import results
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.moments import Moments, PairedMoments
from qwen3_export.solve.methods.gptq.cholesky import cholesky_in_place, damped
from qwen3_export.solve.methods.gptq.columns import multiply

ROWS_AT_ONCE = 512
# α is one number for all output rows; it is found from every so many of them.
CONFIRM_EVERY = 4
_CONFIRMED = 128


@dataclass(frozen=True)
class _Step:
    """The full step by the moments of some samples, for any weight.

    `lower` is the Cholesky factor of H + λI. Where there is no target, `direct` is drift · (H + λI)⁻¹, common to all
    linears with the same inputs.
    """

    moments: Moments
    lower: Tensor
    direct: Tensor | None

    def of(self, weight: Tensor, out_rows: slice, matmul_dtype: torch.dtype) -> Tensor:
        if self.direct is not None:
            return multiply(weight[out_rows], self.direct, matmul_dtype).float()
        # Not in 16 bits: the result is the small difference of two large numbers.
        return _solved(_missing(weight, out_rows, self.moments, torch.float32), self.lower)


@dataclass(frozen=True)
class TargetShift:
    """The shift of all linears with the same inputs."""

    held_out: Moments
    fitted: _Step
    both: _Step

    def target(self, weight: Tensor, pool: Workers) -> Tensor:
        """The weight `[out, in]` to quantize in place of `weight`."""
        return _shifted(weight, self.share(weight, pool), self.both, pool)

    def share(self, weight: Tensor, pool: Workers) -> float:
        """α of one weight `[out, in]`, from the fitted and the held-out samples."""
        some = range(0, len(weight), CONFIRM_EVERY)
        cuts = [some[i : i + _CONFIRMED] for i in range(0, len(some), _CONFIRMED)]
        parts = pool.share_map("confirm", partial(self._confirm, weight, pool.matmul_dtype), cuts)
        confirmed, curvature = (sum(part[i] for part in parts) for i in range(2))
        return min(max(confirmed / curvature, 0.0), 1.0) if curvature > 0 else 0.0

    def _confirm(self, weight: Tensor, matmul_dtype: torch.dtype, out_rows: range) -> tuple[float, float]:
        """Slope and curvature of the held-out error along the fitted step."""
        some = slice(out_rows.start, out_rows.stop, out_rows.step)
        step = self.fitted.of(weight, some, matmul_dtype)
        confirmed = (step * _missing(weight, some, self.held_out, matmul_dtype)).sum(dtype=torch.float64)
        curvature = (multiply(step, self.held_out.hessian, matmul_dtype) * step).sum(dtype=torch.float64)
        return float(confirmed), float(curvature)


def start_shift_factors(moments: PairedMoments, percdamp: float, pool: Workers) -> list[Future[Tensor | None]]:
    """Start to factorise H + λI for a group of linears.

    λ is `percdamp` · mean diag H. Nothing is started where no samples are held out.
    """
    parts = (moments.fitted, moments.joined()) if moments.held_out.tokens else ()
    return [pool.start(partial(_factor, percdamp, part)) for part in parts]


def target_shift_of(moments: PairedMoments, factors: list[Future[Tensor | None]], pool: Workers) -> TargetShift | None:
    """The shift of a group from its factors; None when H is not definite."""
    fitted, both = results(factors)
    if fitted is None or both is None:
        return None
    return TargetShift(moments.held_out, _step(moments.fitted, fitted, pool), _step(moments.joined(), both, pool))


def targets_in_turn(
    moments: PairedMoments, weights: Mapping[str, Tensor], percdamp: float, pool: Workers
) -> dict[str, Tensor]:
    """`TargetShift.target` of all weights, with one factor in memory at a time.

    The memory of `moments` is released. The result is empty where nothing is shifted.
    """
    lower = _factor(percdamp, moments.fitted) if moments.held_out.tokens else None
    if lower is None:
        return {}
    fitted = _step(moments.fitted, lower, pool)
    shift = TargetShift(moments.held_out, fitted, fitted)
    shares = {name: shift.share(weight, pool) for name, weight in weights.items()}
    del shift, fitted, lower
    both = moments.joined()
    moments.release()
    lower = _factor(percdamp, both)
    if lower is None:
        return {}
    step = _step(both, lower, pool)
    return {name: _shifted(weight, shares[name], step, pool) for name, weight in weights.items()}


def _shifted(weight: Tensor, share: float, step: _Step, pool: Workers) -> Tensor:
    steps = pool.share_map("shift", partial(step.of, weight, matmul_dtype=pool.matmul_dtype), _pieces(weight))
    return weight + share * torch.cat(steps)


def _factor(percdamp: float, moments: Moments) -> Tensor | None:
    return cholesky_in_place(damped(moments.hessian, percdamp))


def _step(moments: Moments, lower: Tensor, pool: Workers) -> _Step:
    drift = moments.drift
    if drift is None:
        return _Step(moments, lower, None)
    parts = pool.share_map("drift", lambda out_rows: _solved(drift[out_rows], lower), _pieces(drift))
    return _Step(moments, lower, torch.cat(parts))


def _pieces(matrix: Tensor) -> list[slice]:
    return [slice(i, min(i + ROWS_AT_ONCE, len(matrix))) for i in range(0, len(matrix), ROWS_AT_ONCE)]


def _solved(out_rows: Tensor, lower: Tensor) -> Tensor:
    """`out_rows (L Lᵀ)⁻¹`."""
    half = torch.linalg.solve_triangular(lower.T, out_rows, upper=True, left=False)
    return torch.linalg.solve_triangular(lower, half, upper=False, left=False)


def _missing(weight: Tensor, out_rows: slice, moments: Moments, matmul_dtype: torch.dtype) -> Tensor:
    """Correlation of the missing output with the inputs: `W·drift` or `target − W H`."""
    if moments.target is not None:
        return moments.target[out_rows] - multiply(weight[out_rows], moments.hessian, matmul_dtype)
    assert moments.drift is not None
    return multiply(weight[out_rows], moments.drift, matmul_dtype).float()
