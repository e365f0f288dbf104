"""Checks a result against its limits.

Where the 95 % interval of a value straddles its limit, the check is not conclusive, and says how many positions would
decide it: the width of the interval falls with the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3_export.prove.limits import Limit, limit_named

# `--on`: the limit applies to the mean, or to the worse end of its 95 % interval.
CHOICES = ("mean", "upper")


def check(result: Mapping[str, Any], limits: Mapping[str, float], on: str = "mean") -> dict[str, Any]:
    """The verdict: `{passed, on, checks: [{name, value, limit, passed, …}]}`.

    A value that is NaN or unknown (None) fails. A check of a mean also has its interval `ci95`; `conclusive`, whether
    the limit lies outside of it; the scored `positions`; and `positions_needed`, about how many would decide it, None
    when no number would.
    """
    checks = [_check(result, name, limit, on) for name, limit in limits.items()]
    return {"passed": all(item["passed"] for item in checks), "on": on, "checks": checks}


def _check(result: Mapping[str, Any], name: str, bound: float, on: str) -> dict[str, Any]:
    limit = limit_named(name)
    assert limit is not None, name
    value, interval = _look_up(result, limit.path), _look_up(result, limit.interval) if limit.interval else None
    item: dict[str, Any] = {"name": name, "value": value, "limit": bound}
    if value is None or interval is None or not np.isfinite([value, bound, *interval]).all():
        return {**item, "passed": _holds(value, bound, limit)}
    judged = interval[1 if limit.at_most else 0] if on == "upper" else value
    positions = _look_up(result, f"{limit.path.rpartition('.')[0]}.tokens".lstrip("."))
    return {**item, "passed": _holds(judged, bound, limit), **_precision(value, bound, interval, positions)}


def _holds(value: float | None, bound: float, limit: Limit) -> bool:
    return value is not None and bool(value <= bound if limit.at_most else value >= bound)


def _precision(value: float, bound: float, interval: list[float], positions: int) -> dict[str, Any]:
    low, high = interval
    conclusive = not low < bound < high
    distance = abs(value - bound)
    half = high - value if bound > value else value - low
    needed = math.ceil(round(positions * (half / distance) ** 2, 6)) if distance else None
    decided = {"ci95": [low, high], "conclusive": conclusive, "positions": positions}
    return decided if conclusive else {**decided, "positions_needed": needed}


def _look_up(result: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path, None where there is none.

    A domain's name may itself contain dots.
    """
    value: Any = result
    section, _, rest = path.partition(".")
    keys = [section, *rest.rsplit(".", 1)] if section == "domains" else path.split(".")
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def explain(check: Mapping[str, Any]) -> str:
    """One check in words, for the message of a failure."""
    name, value = check["name"], check["value"]
    if value is None:
        experts = (limit_named(name) or Limit("", True)).path.startswith("experts.")
        what = "say how many tokens its experts were calibrated on" if experts else "have this value"
        return f"{name}: the artifact does not {what}"
    ci95 = check.get("ci95")
    outside = f" (95 %: {short(ci95[0])} … {short(ci95[1])})" if ci95 else ""
    limit = limit_named(name)
    found, wanted = distinct(value, check["limit"])
    if limit and limit.kind == "bytes":
        found, wanted = f"{int(value):,} bytes", f"{int(check['limit']):,} bytes"
    return f"{name} is {found}{outside}, the limit is {wanted}{_doubt(check)}"


def _doubt(check: Mapping[str, Any]) -> str:
    """`; inconclusive at N positions, M would decide it`, or empty text."""
    if check.get("conclusive", True):
        return ""
    needed = check["positions_needed"]
    more = f"about {needed:,} would decide it" if needed else "no number of them would decide it"
    return f"; inconclusive at {check['positions']:,} positions, {more}"


def doubt(check: Mapping[str, Any]) -> str | None:
    """Says in words that a check is inconclusive; None when it is conclusive."""
    return f"{check['name']}{_doubt(check).replace(';', ' is', 1)}" if _doubt(check) else None


def number(value: float) -> str:
    """A number as text with six significant digits, never `-0`."""
    return significant(value, 6)


def short(value: float) -> str:
    """A number as text with four significant digits, integers in full, never `-0`."""
    return significant(value, 4)


def distinct(value: float, other: float) -> tuple[str, str]:
    """Two numbers as text, with enough digits to show that they differ."""
    for digits in range(4, 17):
        texts = significant(value, digits), significant(other, digits)
        if texts[0] != texts[1] or value == other:
            break
    return texts


def significant(value: float, digits: int) -> str:
    """A number as text with `digits` significant digits, integers in full, never `-0`."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value)}"
    return f"{value:.{digits}g}"
