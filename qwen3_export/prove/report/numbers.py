"""Numbers as text, for tables and charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fixed(value: float, digits: int) -> str:
    """A number with `digits` digits after the point, never `-0`."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def kl_mark(item: Mapping[str, Any]) -> str:
    """The mark before a mean KL: `≥` for a bound, `≈` for an estimate."""
    return "≥ " if item.get("kl_is_lower_bound") else "≈ " if item.get("kl_estimate") else ""


def marked_kl(item: Mapping[str, Any], digits: int) -> str:
    """Mean KL, with its mark."""
    return kl_mark(item) + fixed(item["kl_mean"], digits)


def signed(value: float, digits: int = 6) -> str:
    """As `fixed`, with its sign unless it is zero."""
    text = fixed(value, digits)
    return f"+{text}" if float(text) > 0 else text


def short(value: float) -> str:
    """A number with three significant digits, never `-0`."""
    return f"{value + 0.0:.3g}" if value else "0"


def bytes_text(count: float) -> str:
    """A number of bytes as text: `7.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def span(ends: list[float] | None, digits: int = 6) -> str:
    """An interval as text, `-` where there is none."""
    return f"{fixed(ends[0], digits)} … {fixed(ends[1], digits)}" if ends else "-"


def percent(value: float | None) -> str:
    """A share as a percentage, `-` where there is none."""
    return "-" if value is None else f"{fixed(100 * value, 2)} %"
