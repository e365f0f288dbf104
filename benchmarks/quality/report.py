"""Results as one Markdown table per checkpoint and scheme, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEADER = ["tool", "method", "KL (nats)", "top-1", "× best peer", "activations", "wall s", "CPU s", "peak RSS MiB"]


def best_peer(results: Iterable[dict[str, Any]]) -> float | None:
    """The lowest KL of any other tool."""
    return min((r["kl"] for r in results if r["tool"] != "ours" and "kl" in r), default=None)


def line(result: dict[str, Any], best: float | None) -> list[str]:
    """One row of a table."""
    tool = result["tool"]
    if "error" in result:
        return [tool, result["method"], f"failed: {result['error'][:160]}", *[""] * 6]
    return [
        tool,
        result["method"],
        f"{result['kl']:.6f}",
        f"{100 * result['top1']:.2f} %",
        f"{result['kl'] / best:.2f}" if best else "–",
        result["activations"],
        f"{result['wall_s']:.1f}",
        f"{result['cpu_s']:.1f}",
        f"{result['peak_rss'] / 2**20:.0f}",
    ]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in cells)


def markdown(results: list[dict[str, Any]]) -> str:
    """Every checkpoint and scheme with a table of its own, the lowest KL first."""
    parts = []
    for group in dict.fromkeys((r["checkpoint"], r["scheme"]) for r in results):
        members = [r for r in results if (r["checkpoint"], r["scheme"]) == group]
        best = best_peer(members)
        members.sort(key=lambda r: r.get("kl", float("inf")))
        parts.append(f"### {group[0]}, {group[1]}\n\n{table(HEADER, [line(r, best) for r in members])}")
    return "\n\n".join(parts) + "\n"


def write(results: list[dict[str, Any]], output: Path, preface: str) -> None:
    """The Markdown file, and beside it the same as JSON."""
    output.write_text(f"{preface}\n\n{markdown(results)}", encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
