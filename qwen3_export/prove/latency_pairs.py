"""Latency compared with a baseline's, judged by the scatter that both reports recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from typing import Any

from qwen3_export.errors import InputError
from qwen3_export.prove.pair import pair
from qwen3_export.prove.tolerance import Tolerance

# Quantiles of the normal distribution in standard deviations: 95 % lie within ± the first, 95 % below the second.
_TWO_SIDED, _ONE_SIDED = 1.96, 1.645


def latency_pairs(
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    tolerances: Mapping[str, Tolerance],
    strict: bool,
    machines: Sequence[str | None],
) -> Iterator[dict[str, Any]]:
    """Compare medians and 95th percentiles of prefill and decode, and peak memory.

    Load time is compared too where a tolerance for it is given. Without latency in both reports there are no pairs.
    Figures from different processors are inconclusive.
    """
    if "decode" in old and "decode" not in new:
        raise InputError(f"{new['artifact']}: the baseline has its latency, the report has not", "run bench as well")
    if "decode" not in new or "decode" not in old:
        return
    _refuse_unlike(new, old)
    other = machines[0] != machines[1]
    doubt = f"measured on another processor: {machines[0]}, baseline {machines[1]}" if other else None
    for metric, value, before, scatter in _times(new, old):
        tolerance = tolerances.get(metric, tolerances["latency"])
        delta, half = value - before, _TWO_SIDED * scatter
        yield pair(metric, before, value, (delta - half, delta + half), tolerance, strict, doubt=doubt)
    for metric in ("load_seconds", "peak_rss_bytes"):
        if metric not in tolerances or old.get(metric) is None:
            continue
        if new.get(metric) is None:
            raise InputError(f"{new['artifact']}: the baseline has {metric}, the report has not", "run bench as well")
        yield pair(metric, old[metric], new[metric], None, tolerances[metric], strict, doubt=doubt)


def _refuse_unlike(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    lengths = [[item["prompt_tokens"] for item in result["prefill"]] for result in (new, old)]
    for what, ours, theirs in (
        ("the runtime", new["runtime"], old["runtime"]),
        ("the device", new["device"], old["device"]),
        ("the number of threads", new["threads"], old["threads"]),
        ("the prompt lengths", lengths[0], lengths[1]),
    ):
        if ours != theirs:
            raise InputError(
                f"{new['artifact']}: {what} differs: {ours}, baseline {theirs}", "measure both with the same options"
            )


def _times(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    """`(metric, value, baseline, scatter)` in seconds; the scatter combines both reports."""
    for ours, theirs in zip(new["prefill"], old["prefill"], strict=True):
        scatter = hypot(*(_deviation(item, item["seconds_p50"], item["seconds_p95"]) for item in (ours, theirs)))
        for name in ("p50", "p95"):
            metric = f"prefill.{ours['prompt_tokens']}.{name}"
            yield metric, ours[f"seconds_{name}"], theirs[f"seconds_{name}"], scatter
    ours, theirs = new["decode"], old["decode"]
    scatter = hypot(*(_deviation(item, item["per_token_seconds_p50"], item["p95"]) for item in (ours, theirs)))
    yield "decode.p50", ours["per_token_seconds_p50"], theirs["per_token_seconds_p50"], scatter
    yield "decode.p95", ours["p95"], theirs["p95"], scatter


def _deviation(item: Mapping[str, Any], median: float, p95: float) -> float:
    """Standard deviation of single measurements, as recorded or from the percentiles."""
    recorded = item.get("scatter")
    return float(recorded) * median if recorded is not None else (p95 - median) / _ONE_SIDED
