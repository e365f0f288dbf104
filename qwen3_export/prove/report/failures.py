"""The head of a report: failures, remarks, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_export.prove.gate import distinct, doubt, explain, short
from qwen3_export.prove.report.numbers import bytes_text, span
from qwen3_export.prove.report.tables import named, named_failures


def failures(result: Mapping[str, Any]) -> list[str]:
    """Every artifact that was not measured, failed check and worse pair in words."""
    unmeasured = [f"{name}: not measured: {item['error']}" for name, item in named_failures(result)]
    return unmeasured + _told(result)[0]


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Checks that are inconclusive, and warnings about doubtful figures."""
    warnings = [f"{name}: {text}" for name, item in named(result) for text in item.get("warnings") or ()]
    return _told(result)[1] + warnings


def _told(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Texts of what failed, and of what is inconclusive."""
    failed, doubtful = list[str](), list[str]()
    for name, item in named(result):
        for check in item.get("gate", {}).get("checks", ()):
            if not check["passed"]:
                failed.append(f"{name}: {explain(check)}")
            elif doubt(check):
                doubtful.append(f"{name}: passed, but {doubt(check)}")
    for item in result.get("pairs", ()):
        before, after = distinct(item["baseline"], item["value"])
        text = f"{item['artifact']}: {item['metric']} {before} → {after}"
        if item["verdict"] == "worse":
            failed.append(f"{text}, worse by more than {short(item['allowed'])} (change {span(item['ci95'])})")
        elif item["verdict"] == "inconclusive":
            reason = item["reason"] or f"change {span(item['ci95'])}, allowed {short(item['allowed'])}"
            doubtful.append(f"{text}, inconclusive: {reason}")
    return failed, doubtful


def environment_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`(what, value)`: machine, load, versions and date; reference, text and positions."""
    values = result.get("environment") or {}
    lines = [
        (name, str(values[key]))
        for key, name in {"host": "host", "system": "system", "cpu": "processor", "cores": "cores"}.items()
        if key in values
    ]
    if "load_average" in values:
        lines.append(("load average (1, 5, 15 minutes)", ", ".join(f"{load:g}" for load in values["load_average"])))
    if "memory_bytes" in values:
        lines.append(("memory", bytes_text(values["memory_bytes"])))
    threads = sorted({str(item["threads"]) for _, item in named(result) if "threads" in item} | _settings(result))
    if threads:
        lines.append(("threads", ", ".join(threads)))
    if "versions" in values:
        versions = {"Python": values["python"], **values["versions"]}
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if "date" in values:
        lines.append(("date", values["date"]))
    for field, what in {"reference_sha256": "reference", "text_sha256": "text", "tokens": "positions"}.items():
        found = sorted({str(item[field]) for _, item in named(result) if field in item})
        if found:
            lines.append((what, ", ".join(found)))
    return lines


def _settings(result: Mapping[str, Any]) -> set[str]:
    return {str(item["settings"]["threads"]) for _, item in named(result) if "settings" in item}
