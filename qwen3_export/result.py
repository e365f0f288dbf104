"""Results of the Python interface: dictionaries that a notebook shows as tables."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

# Columns of the table: heading, and the dotted path of the value. A column without any value is left out.
_COLUMNS = {
    "artifact": "artifact",
    "runtime": "runtime",
    "KL (nats)": "kl_mean",
    "top-1": "top1_agreement",
    "ppl ratio": "ppl_ratio",
    "bytes": "bytes",
    "load s": "load_seconds",
    "decode tok/s": "decode.tokens_per_second_p50",
    "passed": "gate.passed",
}


class Result(dict[str, Any]):
    """A command's JSON result, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        results = self.get("results")
        if not isinstance(results, list):
            rows = [[key, _shown(value)] for key, value in self.items() if not isinstance(value, list | dict)]
            return _html_table(["", ""], rows)
        named = {name: path for name, path in _COLUMNS.items() if any(_at(item, path) is not None for item in results)}
        rows = [[_shown(_at(item, path)) for path in named.values()] for item in results]
        return _html_table(list(named), rows) + _not_measured(self)


def _at(item: Mapping[str, Any], path: str) -> Any:
    found: Any = item
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _shown(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)


def _not_measured(result: Mapping[str, Any]) -> str:
    if not result.get("failed"):
        return ""
    from qwen3_export.prove.report.failures import failures

    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in failures(result))}</ul>"


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
