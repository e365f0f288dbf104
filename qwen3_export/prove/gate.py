"""Limits on a validation result → a verdict with every check spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qwen3_export.errors import InputError

# Name of a limit → (path of the value in a result, whether the value must not exceed it).
LIMITS: dict[str, tuple[str, bool]] = {
    "max_kl": ("kl_mean", True),
    "max_kl_p99": ("kl_p99", True),
    "min_top1": ("top1_agreement", False),
    "max_ppl_ratio": ("ppl_ratio", True),
    "max_bytes": ("bytes", True),
    "max_extra_loops": ("generation.extra_loops", True),
    "min_expert_tokens": ("experts.min_tokens", False),
    "max_experts_below_floor": ("experts.below_floor", True),
}


def read_limits(path: Path) -> dict[str, float]:
    """Read a gate file, YAML or JSON: `{max_kl: 0.02, min_top1: 0.9, …}`; InputError when malformed."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable gate file ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: a mapping of limits was expected", f"known limits: {', '.join(LIMITS)}")
    for name, value in values.items():
        if name not in LIMITS or isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {name}: {value!r} is no limit", f"known limits: {', '.join(LIMITS)}")
    return {name: float(value) for name, value in values.items()}


def refuse_without_experts(limits: Mapping[str, float], artifact: Path, experts: Mapping[str, Any] | None) -> None:
    """Raise InputError when a limit is on experts and the artifact's model has none."""
    for name in limits:
        if LIMITS[name][0].startswith("experts.") and experts is None:
            raise InputError(
                f"{name}: {artifact} is a dense model, it has no experts", "leave this limit away for dense models"
            )


def check(result: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """`{passed, checks: [{name, value, limit, passed}]}`; a value that is NaN or unknown (None) fails."""
    checks = []
    for name, limit in limits.items():
        path, at_most = LIMITS[name]
        value: Any = result
        for key in path.split("."):
            value = value[key]
        passed = value is not None and (value <= limit if at_most else value >= limit)
        checks.append({"name": name, "value": value, "limit": limit, "passed": bool(passed)})
    return {"passed": all(item["passed"] for item in checks), "checks": checks}


def explain(check: Mapping[str, Any]) -> str:
    """One check in words, for a failure's message."""
    if check["value"] is None:
        return f"{check['name']}: the artifact does not say how many tokens its experts were calibrated on"
    return f"{check['name']} is {check['value']:.6g}, the limit is {check['limit']:g}"
