"""Tolerances: how much worse than its baseline an artifact may be.

kl_mean: 5%              relative to the baseline's value
top1_agreement: 0.002    absolute
bytes: 100kB
latency: 10%             every time of a latency run; a single one by its own name
domains: {math: {kl_mean: 10%}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_yaml
from qwen3_export.errors import InputError
from qwen3_export.prove.limits import parse_number

DRIFT = ("kl_mean", "top1_agreement", "ppl_ratio")
_SIZES = ("bytes", "peak_rss_bytes")
_KNOWN = (*DRIFT, *_SIZES, "latency", "load_seconds")
_LATENCY = re.compile(r"(prefill\.\d+|decode)\.(p50|p95)|load_seconds")


@dataclass(frozen=True)
class Tolerance:
    """The larger of a share of the baseline and an absolute amount."""

    relative: float = 0.0
    absolute: float = 0.0

    def allowed(self, baseline: float) -> float:
        """The allowed change of a value, in its own unit."""
        return max(self.relative * abs(baseline), self.absolute)


# Smaller changes do not matter even where they are significant.
DEFAULTS = {
    "kl_mean": Tolerance(relative=0.05, absolute=1e-5),
    "top1_agreement": Tolerance(absolute=0.002),
    "ppl_ratio": Tolerance(absolute=0.002),
    "bytes": Tolerance(relative=0.01),
    "peak_rss_bytes": Tolerance(relative=0.1),
    "latency": Tolerance(relative=0.1),
}


def read_tolerance(path: Path | None) -> dict[str, Tolerance]:
    """Read tolerances by metric from a YAML or JSON file, defaults for the others.

    Raises InputError for a malformed file.
    """
    if path is None:
        return dict(DEFAULTS)
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: a mapping of tolerances was expected", _hint())
    return {**DEFAULTS, **_tolerances(path, values)}


def _tolerances(path: Path, values: Mapping[Any, Any]) -> dict[str, Tolerance]:
    found = {}
    for name, value in values.items():
        if name == "domains" and isinstance(value, Mapping):
            for domain, inner in value.items():
                for metric, amount in inner.items() if isinstance(inner, Mapping) else ((str(inner), None),):
                    if metric not in DRIFT:
                        raise InputError(f"{path}: domains.{domain}: {metric} is no metric of a domain", _hint())
                    found[f"domains.{domain}.{metric}"] = _tolerance(path, metric, amount)
        elif name in _KNOWN or _LATENCY.fullmatch(str(name)):
            found[str(name)] = _tolerance(path, str(name), value)
        else:
            raise InputError(f"{path}: {name}: no such metric", _hint())
    return found


def _tolerance(path: Path, name: str, value: object) -> Tolerance:
    text = str(value).strip()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if share:
        return Tolerance(relative=float(share[1]) / 100)
    number = parse_number(value, size=name in _SIZES)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        raise InputError(f"{path}: {name}: {value!r} is no tolerance", "a number, a size such as 100kB, or 5%")
    return Tolerance(absolute=float(number))


def _hint() -> str:
    return f"known: {', '.join(_KNOWN)}, prefill.TOKENS.p50, decode.p95, domains: {{NAME: {{{', '.join(DRIFT)}}}}}"
