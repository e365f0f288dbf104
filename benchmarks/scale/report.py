"""The results as Markdown: a table of runs, and one extrapolated to full depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.scale.models import MODELS

Record = dict[str, Any]
_HEAD = """# Large models on a small machine

Written by `python -m benchmarks.scale`. Slices have the exact widths and vocabulary of the model and random weights.
Every run is a process of its own on a machine with 2 cores and 24 GB; activations lie in a `--scratch` folder. Peak
memory is the kernel's high-water mark, scratch the most that the folder held. `plan` is what the command of that
name said beforehand; ratios are measured / predicted. Memory and disk are those of the slice, embedding and head of
the real vocabulary included.
"""


def report(records: Sequence[Record]) -> str:
    """The whole results file."""
    ordered = sorted(records, key=lambda r: (list(MODELS).index(r["model"]), r["what"], r["rows"], r["layers"]))
    runs = [_HEAD, "## Runs", "", *_runs(ordered), "", "## At full depth", "", *_lines(ordered), ""]
    return "\n".join([*runs, "## Where the time goes", "", *_spent(ordered), ""])


def _runs(records: Sequence[Record]) -> list[str]:
    header = [
        "model", "what", "layers", "rows", "wall s", "CPU s", "peak GB", "plan", "scratch GB", "written GB",
        "plan's wall",
        "experts: fewest tokens, below the floor",
    ]  # fmt: skip
    rows = []
    for r in records:
        plan, experts = r.get("plan", {}), r.get("experts")
        rows.append([
            r["model"], r["what"], r["layers"], r["rows"] if r["scratch_bytes"] else "–",
            f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}", f"{r['peak_rss'] / 1e9:.2f}",
            _ratio(r["peak_rss"], plan.get("peak_rss_bytes"), 1e9, "GB"), f"{r['scratch_bytes'] / 1e9:.2f}",
            f"{r['disk_bytes'] / 1e9:.2f}", _ratio(r["wall_s"], plan.get("seconds"), 1, "s"),
            _coverage(r, experts),
        ])  # fmt: skip
    return _table(header, rows)


def _spent(records: Sequence[Record]) -> list[str]:
    """Wall seconds by kind of work; those of the deepest slice of each model and recipe."""
    deepest = {(r["model"], r["what"], r["rows"]): r for r in records if r.get("spent")}
    rows = []
    for r in deepest.values():
        rest = r["wall_s"] - sum(r["spent"].values())
        parts = sorted({**r["spent"], "other": rest}.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{label} {value:.0f} ({value / r['wall_s']:.0%})" for label, value in parts if value >= 0.5)
        rows.append([r["model"], r["what"], r["layers"], r["rows"], f"{r['cpu_s'] / r['wall_s']:.2f}", shown])
    return _table(["model", "what", "layers", "rows", "cores busy", "wall seconds"], rows)


def _coverage(record: Record, experts: dict[str, Any] | None) -> str:
    if not experts or experts.get("min_tokens") is None:
        return "–"
    total = record["layers"] * MODELS[record["model"]].config["num_experts"]
    return f"{experts['min_tokens']}, {experts['below_floor']} of {total}"


def _ratio(measured: float, predicted: float | None, unit: float, name: str) -> str:
    return "–" if not predicted else f"{predicted / unit:.{2 if unit > 1 else 0}f} {name}, {measured / predicted:.2f}"


def _lines(records: Sequence[Record]) -> list[str]:
    """Rows per layer and at full depth, on the line through two slices.

    These are the shallowest and the deepest slice that were measured.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r["model"], r["what"], r["rows"]), []).append(r)
    header = ["model", "what", "from layers", "wall s a layer", "CPU s a layer", "peak GB by layers", "full depth"]
    rows = []
    for (model, what, _), several in groups.items():
        first, last, depth = several[0], several[-1], MODELS[model].layers
        count = last["layers"] - first["layers"]
        per = {m: (last[m] - first[m]) / count if count else first[m] / first["layers"] for m in ("wall_s", "cpu_s")}
        whole = last["wall_s"] + per["wall_s"] * (depth - last["layers"])
        rows.append([
            model, what, ", ".join(str(r["layers"]) for r in several) + ("" if count else " (all of the run)"),
            f"{per['wall_s']:.0f}", f"{per['cpu_s']:.0f}", ", ".join(f"{r['peak_rss'] / 1e9:.2f}" for r in several),
            f"{depth} layers: {whole / 3600:.1f} h",
        ])  # fmt: skip
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]
