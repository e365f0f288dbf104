"""One metric compared with its baseline: the difference, its interval, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

from qwen3_export.prove.tolerance import Tolerance

# The metric, also of a domain, whose smaller values are worse.
HIGHER_IS_BETTER = "top1_agreement"


def pair(
    metric: str,
    baseline: float,
    value: float,
    interval: Sequence[float] | None,
    tolerance: Tolerance,
    strict: bool,
    *,
    doubt: str | None = None,
) -> dict[str, Any]:
    """`{metric, baseline, value, delta, ci95, allowed, verdict, reason}`, in the metric's unit.

    `interval` is the 95 % interval of the difference, None when the difference is exact. With a `doubt`, a reason in
    words, the interval decides nothing: with `strict` the difference itself does, else the verdict is inconclusive.
    Raises ValueError where a figure is no finite number.
    """
    if not all(map(isfinite, (baseline, value, *(interval or ())))):
        raise ValueError(f"{metric} is no finite number")
    delta, allowed = value - baseline, tolerance.allowed(baseline)
    low, high = interval if interval is not None else (delta, delta)
    sign = -1 if metric.endswith(HIGHER_IS_BETTER) else 1
    bad_low, bad_high = sorted((sign * low, sign * high))
    if doubt:
        bad_low, bad_high = -inf, inf
    verdict = judge(sign * delta, bad_low, bad_high, allowed, strict)
    return {
        "metric": metric,
        "baseline": baseline,
        "value": value,
        "delta": delta,
        "ci95": [low, high],
        "allowed": allowed,
        "verdict": verdict,
        "reason": doubt,
    }


def may_be_worse(item: Mapping[str, Any]) -> bool:
    """Whether a pair is inconclusive, and its difference alone beyond what is allowed."""
    sign = -1 if item["metric"].endswith(HIGHER_IS_BETTER) else 1
    return bool(item["verdict"] == "inconclusive" and sign * item["delta"] > item["allowed"])


def judge(delta: float, low: float, high: float, allowed: float, strict: bool) -> str:
    """The verdict on a difference, where larger is worse; see `prove.baseline`."""
    if low > allowed:
        return "worse"
    if -allowed <= low and high <= allowed:
        return "same"
    if high < 0:
        return "better"
    return "worse" if strict and delta > allowed else "inconclusive"
