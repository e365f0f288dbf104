"""Tables of generated texts, flips and tasks, and of where drift comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen3_export.prove.report.numbers import fixed, percent, short, span
from qwen3_export.prove.report.table import ReportTable


def texts(drifts: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ReportTable]:
    """Tables of greedy texts beside the original's, plain and as chats, and of flips.

    A flip is another most likely token where the original is sure of its own.
    """
    modes = {"plain": None, "thinking": "thinking", "no thinking": "no_thinking"}
    rows = [
        [name, label, *_text_cells(item["generation"] if mode is None else item["generation"][mode])]
        for name, item in drifts
        for label, mode in modes.items()
        if item.get("generation") and (mode is None or item["generation"].get(mode))
    ]
    if rows:
        headers = ["artifact", "texts", "number", "agreement", "equal tokens", "loops/original's", "stops/original's"]
        yield ReportTable("Generated texts", headers, rows)
    flips = [
        [
            name,
            str(found["flips"]),
            str(found["sure_positions"]),
            percent(found["share"]),
            fixed(found["sure_from"], 2),
        ]
        for name, found in ((name, item.get("flips")) for name, item in drifts)
        if found
    ]
    if flips:
        headers = ["artifact", "flips", "sure positions", "share", "sure from"]
        yield ReportTable("Flips of the top token where the original is sure", headers, flips)


def _text_cells(found: Mapping[str, Any]) -> list[str]:
    length = found.get("agreement_length")
    stops = f"{found['stops']}/{found['stops_reference']}" if "stops" in found else "-"
    return [
        str(found["texts"]),
        fixed(found["agreement"], 4),
        "-" if length is None else f"{fixed(length, 1)} of {fixed(found['reference_length'], 1)}",
        f"{found['loops']}/{found['loops_reference']}",
        stops,
    ]


def tasks(drifts: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ReportTable]:
    """A table of right answers of original and artifact, by kind of task."""
    rows = []
    for name, item in drifts:
        found = item.get("tasks")
        if found:
            rows += [
                [name, kind, str(one["tasks"]), str(one["original_right"]), str(one["artifact_right"]), "-", "-"]
                for kind, one in found["kinds"].items()
            ]
            counts = [str(found[key]) for key in ("tasks", "original_right", "artifact_right", "right_to_wrong")]
            rows.append([name, "all", *counts, span(found["lost_share_ci95"], 3)])
    if rows:
        headers = ["artifact", "kind", "tasks", "original right", "artifact right", "right → wrong", "lost share 95 %"]
        yield ReportTable("Tasks", headers, rows)


def explanations(drifts: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ReportTable]:
    """Tables of the linears, experts and channels with most error, from `--explain`."""
    for name, item in drifts:
        found = item.get("explain")
        for kind in ("linears", "experts", "channels"):
            rows = found.get(kind) if isinstance(found, Mapping) else None
            if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
                headers = list(rows[0])
                cells = [[_cell(row.get(key)) for key in headers] for row in rows[:12]]
                yield ReportTable(f"{name}: worst {kind}", headers, cells)


def _cell(value: object) -> str:
    return short(value) if isinstance(value, float) else "-" if value is None else str(value)
