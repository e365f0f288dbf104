"""report.html: one file that needs no network and no script.

It has a light, a dark and a print style.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from qwen3_export.prove.report.charts import charts
from qwen3_export.prove.report.failures import environment_lines, failures
from qwen3_export.prove.report.style import STYLE
from qwen3_export.prove.report.svg import Chart
from qwen3_export.prove.report.table import Table
from qwen3_export.prove.report.tables import tables, verdict_of

_GOOD, _BAD = ("pass", "same", "better"), ("FAIL", "worse")


def page(result: Mapping[str, Any], title: str) -> str:
    """Verdict and failed checks on top, then pictures, tables and the environment."""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Nothing is fetched, whatever stands in a name; the icon is none, so that no browser asks for one.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *_top(result, title),
            *(_figure(chart) for chart in charts(result)),
            *(_table(table) for table in tables(result)),
            *_environment(result),
            "</main>\n</body>\n</html>\n",
        )
    )


def _top(result: Mapping[str, Any], title: str) -> Iterator[str]:
    verdict = verdict_of(result)
    yield f"<h1>{escape(title)}</h1>"
    if verdict == "-" and "candidates" not in result:
        yield '<p class="verdict none">no limits were given</p>'
    elif verdict != "-":
        yield f'<p class="verdict {_class(verdict)}">{escape(verdict)}</p>'
    found = failures(result)
    if found:
        yield '<ul class="failures">' + "".join(f"<li>{escape(text)}</li>" for text in found) + "</ul>"


def _class(verdict: str) -> str:
    """The style of a verdict, without any remark in brackets."""
    word = verdict.split(" ")[0]
    return "good" if word in _GOOD else "bad" if word in _BAD else "doubt" if word == "inconclusive" else ""


def _figure(chart: Chart) -> str:
    return (
        f"<section><h2>{escape(chart.title)}</h2><figure>{chart.svg}"
        f"<figcaption>{escape(chart.caption)}</figcaption></figure></section>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    body = "".join("<tr>" + "".join(_cells(row)) + "</tr>" for row in table.rows)
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _cells(row: Any) -> Iterator[str]:
    for index, cell in enumerate(row):
        if index == 0:
            yield f'<th scope="row">{escape(cell)}</th>'
        else:
            kind = _class(cell)
            yield f'<td class="{kind}">{escape(cell)}</td>' if kind else f"<td>{escape(cell)}</td>"


def _environment(result: Mapping[str, Any]) -> Iterator[str]:
    facts = environment_lines(result)
    if facts:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        yield f"<section><h2>Environment</h2><dl>{rows}</dl></section>"
