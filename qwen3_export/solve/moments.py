"""What the calibration rows say about one linear's inputs: means over all tokens that reach it.

    hessian   mean x xᵀ           [in, in]   x: its inputs in the quantized model so far
    drift     mean (x̃ − x) xᵀ     [in, in]   x̃: the same inputs in the original model
    residual  mean (r̃ − r) xᵀ     [out, in]  r̃, r: the residual streams that its output is added to
    mean_abs  mean |x|            [in]
    peak      max |x|             [in]

Sums run over column strips side by side, each over the rows in their order, so that they do not
depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.model.workers import Workers

_STRIP = 512


@dataclass(frozen=True)
class Sample:
    """One row's inputs `[n, in]`, and how far they and the residual stream are from the original's."""

    x: Tensor
    drift: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """See the module docstring; `drift` and `residual` only where the original was run beside."""

    tokens: int
    hessian: Tensor
    drift: Tensor | None = None
    residual: Tensor | None = None
    mean_abs: Tensor | None = None
    peak: Tensor | None = None

    def join(self, other: Moments) -> Moments:
        """Moments over both sets of tokens."""
        total = max(self.tokens + other.tokens, 1)
        mine, theirs = self.tokens / total, other.tokens / total

        def mean(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a * mine + b * theirs

        hessian = self.hessian * mine + other.hessian * theirs
        drift, residual = mean(self.drift, other.drift), mean(self.residual, other.residual)
        peak = None if self.peak is None or other.peak is None else torch.maximum(self.peak, other.peak)
        mean_abs = mean(self.mean_abs, other.mean_abs)
        return Moments(self.tokens + other.tokens, hessian, drift, residual, mean_abs, peak)


def collect(
    sample: Callable[[int], Sample], rows: Sequence[int], at_once: int, size: int, device: str, pool: Workers
) -> Moments:
    """Moments over `rows`, `at_once` of them in memory; `size` is the linear's number of inputs."""
    hessian, tokens = torch.zeros(size, size, device=device), 0
    others: dict[str, Tensor] = {}
    sum_abs, peak = torch.zeros(size, device=device), torch.zeros(size, device=device)
    strips = [slice(i, min(i + _STRIP, size)) for i in range(0, size, _STRIP)]
    for begin in range(0, len(rows), at_once):
        samples = pool.map(sample, rows[begin : begin + at_once])
        x = torch.cat([item.x for item in samples])
        tokens += len(x)
        if len(x):
            sum_abs += x.abs().sum(0)
            peak = torch.maximum(peak, x.abs().amax(0))

        def upper(columns: slice, x: Tensor = x) -> None:
            hessian[: columns.stop, columns].addmm_(x[:, : columns.stop].T, x[:, columns])

        pool.map(upper, strips)
        for name in ("drift", "residual"):
            parts = [part for item in samples if (part := getattr(item, name)) is not None]
            if parts:
                _add_cross(others, name, torch.cat(parts), x, strips, pool)
    count = max(tokens, 1)
    triangle = hessian.triu() / count
    means = {name: total / count for name, total in others.items()}
    full = triangle + triangle.triu(1).T
    return Moments(tokens, full, means.get("drift"), means.get("residual"), sum_abs / count, peak)


def _add_cross(
    totals: dict[str, Tensor], name: str, left: Tensor, x: Tensor, strips: list[slice], pool: Workers
) -> None:
    if name not in totals:
        totals[name] = torch.zeros(left.shape[1], x.shape[1], device=x.device)
    total = totals[name]
    pool.map(lambda columns: total[:, columns].addmm_(left.T, x[:, columns]), strips)
