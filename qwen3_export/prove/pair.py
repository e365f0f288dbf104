"""One metric compared with its baseline: the difference, its interval, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen3_export.prove.tolerance import Tolerance


def pair(
    metric: str,
    baseline: float,
    value: float,
    interval: Sequence[float] | None,
    tolerance: Tolerance,
    strict: bool,
    *,
    higher_is_better: bool = False,
    doubt: str | None = None,
) -> dict[str, Any]:
    """`{metric, baseline, value, delta, ci95, allowed, verdict, reason}`, in the metric's unit.

    `interval` is the 95 % interval of the difference, None when the difference is exact. With a `doubt`, a reason in
    words, the verdict is inconclusive whatever the figures.
    """
    delta, allowed = value - baseline, tolerance.allowed(baseline)
    low, high = interval if interval is not None else (delta, delta)
    sign = -1 if higher_is_better else 1
    bad_low, bad_high = sorted((sign * low, sign * high))
    verdict = judge(sign * delta, bad_low, bad_high, allowed, strict)
    return {
        "metric": metric,
        "baseline": baseline,
        "value": value,
        "delta": delta,
        "ci95": [low, high],
        "allowed": allowed,
        "verdict": "inconclusive" if doubt else verdict,
        "reason": doubt,
    }


def judge(delta: float, low: float, high: float, allowed: float, strict: bool) -> str:
    """The verdict on a difference, where larger is worse; see `prove.baseline`."""
    if low > allowed:
        return "worse"
    if -allowed <= low and high <= allowed:
        return "same"
    if high < 0:
        return "better"
    return "worse" if strict and delta > allowed else "inconclusive"
