"""report.html: one file without scripts or network, in light, dark and print styles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qwen3_export.prove.report.charts import charts
from qwen3_export.prove.report.failures import environment_lines, failures, remarks
from qwen3_export.prove.report.style import STYLE
from qwen3_export.prove.report.svg import Chart
from qwen3_export.prove.report.table import ReportTable
from qwen3_export.prove.report.tables import tables, verdict_of

_GOOD, _BAD = ("pass", "same", "better"), ("FAIL", "worse")
# Tables that come before the charts, and columns of words.
_LEADING = ("Against the baseline", "Candidates", "Drift", "Checks")
_WORDS = frozenset(("runtime", "check", "metric", "report", "texts", "task", "linear", "kind"))


def page(result: Mapping[str, Any], title: str) -> str:
    """The whole page: verdict, failed checks, tables, charts and environment."""
    found = list(tables(result))
    leading = [table for table in found if table.title in _LEADING]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The policy forbids fetching, whatever a name contains; the empty icon keeps browsers from asking for one.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *_top(result, title),
            *(_table(table) for table in leading),
            '<div class="charts">',
            *(_figure(chart) for chart in charts(result)),
            "</div>",
            *(_table(table) for table in found if table not in leading),
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
    for kind, found in (("failures", failures(result)), ("remarks", remarks(result))):
        if found:
            yield f'<ul class="{kind}">' + "".join(f"<li>{escape(text)}</li>" for text in found) + "</ul>"


def _class(verdict: str) -> str:
    """The CSS class of a verdict, a remark in brackets left out."""
    word = verdict.split(" ")[0]
    return "good" if word in _GOOD else "bad" if word in _BAD else "doubt" if word == "inconclusive" else ""


def _figure(chart: Chart) -> str:
    return (
        f'<section><h2>{escape(chart.title)}</h2><figure><div class="wide">{chart.svg}</div>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure></section>"
    )


def _table(table: ReportTable) -> str:
    words = [header in _WORDS for header in table.headers]
    head = "".join(
        f'<th scope="col"{_kind("words" if word else "")}>{escape(header)}</th>'
        for header, word in zip(table.headers, words, strict=True)
    )
    body = "".join("<tr>" + "".join(_cells(row, words)) + "</tr>" for row in table.rows)
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _cells(row: Sequence[str], words: Sequence[bool]) -> Iterator[str]:
    for index, (cell, word) in enumerate(zip(row, words, strict=True)):
        if index == 0:
            yield f'<th scope="row">{escape(cell)}</th>'
        else:
            yield f"<td{_kind('words' if word else _class(cell))}>{escape(cell)}</td>"


def _kind(name: str) -> str:
    return f' class="{name}"' if name else ""


def _environment(result: Mapping[str, Any]) -> Iterator[str]:
    facts = environment_lines(result)
    if facts:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        yield f"<section><h2>Environment</h2><dl>{rows}</dl></section>"
