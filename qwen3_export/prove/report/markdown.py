"""report.md: the tables of a result, the verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_export.prove.report.failures import environment_lines, failures, remarks
from qwen3_export.prove.report.tables import tables, verdict_of


def markdown(result: Mapping[str, Any], title: str) -> str:
    """Title, verdict, failed checks, all tables, and the environment."""
    lines = [f"# {title}", ""]
    verdict = verdict_of(result)
    if verdict != "-":
        lines += [f"**{verdict}**", ""]
    told = failures(result) + remarks(result)
    lines += [f"- {_escape(text)}" for text in told] + ([""] if told else [])
    for index, table in enumerate(tables(result)):
        # The title is the heading of the first table.
        lines += [f"## {_escape(table.title)}", ""] if index else []
        lines += _table(table.headers, table.rows)
    facts = environment_lines(result)
    if facts:
        lines += ["## Environment", "", *(f"- {name}: {_escape(value)}" for name, value in facts), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(map(_escape, line))} |" for line in lines] + [""]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
