"""`compare`: candidates of several reports in one table, the Pareto front marked.

A candidate is on the front when no other is at least as good in size, drift and speed, and better in one of them.
Another is so only if it has every figure that the candidate has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from qwen3_export.errors import InputError
from qwen3_export.prove.baseline import read_report
from qwen3_export.prove.naming import unique_names

# The figures that are compared, and whether larger is better.
_AXES = {"bytes": False, "kl_mean": False, "tokens_per_second": True}


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """The result of `compare`: `{candidates: [{name, report, …, pareto}], notes}`.

    One report's drift and another's latency of the same artifact become one candidate. Raises InputError where drift
    was measured against different originals or texts, since such figures are not comparable.
    """
    reports = [read_report(path) for path in paths]
    merged: list[dict[str, Any]] = []
    for name, report in zip(unique_names([str(path) for path in paths]), reports, strict=True):
        for item in report["results"]:
            _merge(merged, name, item)
    _refuse_unlike(merged)
    candidates = [_candidate(item) for item in merged]
    for item, name in zip(candidates, _names(candidates), strict=True):
        item["name"] = name
    for item in candidates:
        item["pareto"] = _comparable(item) and not any(_dominates(other, item) for other in candidates)
    return {"candidates": candidates, "notes": _notes(reports)}


def _merge(merged: list[dict[str, Any]], report: str, item: Mapping[str, Any]) -> None:
    """Merge a result into its artifact's candidate.

    Where a figure was measured twice, the result becomes a candidate of its own.
    """
    measured = {field for field in ("kl_mean", "decode") if field in item}
    for known in merged:
        if known["artifact"] == item["artifact"] and not measured & set(known):
            known |= {**item, "report": f"{known['report']}, {report}"}
            return
    merged.append({**item, "report": report})


def _names(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names, with the report's name where an artifact is in several reports.

    Leading `..` of a path are left out: they say where a report was made, not what it measured.
    """
    paths = [str(PurePath(*(part for part in PurePath(c["artifact"]).parts if part != ".."))) for c in candidates]
    distinct = list(dict.fromkeys(paths))
    short = dict(zip(distinct, unique_names(distinct), strict=True))
    full = [
        f"{short[path]} ({item['report']})" if paths.count(path) > 1 else short[path]
        for path, item in zip(paths, candidates, strict=True)
    ]
    return unique_names(full) if len(set(full)) < len(full) else full


def _refuse_unlike(items: Sequence[Mapping[str, Any]]) -> None:
    measured = [item for item in items if "kl_mean" in item]
    for field, what in (("reference_sha256", "original"), ("text_sha256", "text")):
        for item in measured[1:]:
            if item.get(field) != measured[0].get(field):
                raise InputError(
                    f"{item['artifact']}: measured against another {what} than {measured[0]['artifact']}",
                    "validate all candidates with one reference",
                )


def _candidate(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "artifact": item["artifact"],
        "report": item["report"],
        "runtime": item["runtime"],
        "bytes": item.get("bytes"),
        "kl_mean": item.get("kl_mean"),
        "kl_ci95": item.get("kl_ci95"),
        "kl_estimate": item.get("kl_estimate"),
        "kl_is_lower_bound": item.get("kl_is_lower_bound"),
        "top1_agreement": item.get("top1_agreement"),
        "ppl_ratio": item.get("ppl_ratio"),
        "tokens_per_second": item.get("decode", {}).get("tokens_per_second_p50"),
        "peak_rss_bytes": item.get("peak_rss_bytes"),
        "passed": item.get("gate", {}).get("passed"),
    }


def _comparable(item: Mapping[str, Any]) -> bool:
    return any(item[axis] is not None for axis in _AXES)


def _dominates(other: Mapping[str, Any], item: Mapping[str, Any]) -> bool:
    """Whether another candidate is at least as good in all, and better in one.

    All means every figure that the candidate has: the other has them too. Further ones of the other do not count.
    """
    known = [axis for axis in _AXES if item[axis] is not None]
    if any(other[axis] is None for axis in known):
        return False
    signs = [(other[axis] - item[axis]) * (1 if _AXES[axis] else -1) for axis in known]
    return len(signs) > 1 and min(signs) >= 0 and max(signs) > 0


def _notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on artifacts that are missing, and on what makes speeds incomparable."""
    notes = [
        f"{item['artifact']} is left out: it was not measured: {item['error']}"
        for report in reports
        for item in report.get("failed") or ()
    ]
    machines = sorted({str(report["environment"].get("cpu")) for report in reports if report.get("environment")})
    if len(machines) > 1:
        notes.append(f"measured on different processors, so speeds do not compare: {'; '.join(machines)}")
    return notes
