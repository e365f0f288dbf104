"""The commands `gate` and `compare`, which read reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import table, tell
from qwen3_export.core.outputs import check_output

Reports = Annotated[Path | None, typer.Option("--report", help="Folder for report.json, .md, .html and .xml (JUnit).")]


@app.command(epilog="Example: qwen3-export gate report --baseline report-of-the-release --tolerance tolerance.yaml")
def gate(
    report: Annotated[Path, typer.Argument(help="A report folder of validate or bench, or its report.json.")],
    baseline: Annotated[Path, typer.Option(help="The report to compare with.")],
    tolerance: Annotated[Path | None, typer.Option(help="YAML or JSON file: what may get worse by how much.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="What is beyond its tolerance fails, chance or not.")
    ] = False,
    output: Reports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a report with a baseline's, row by row.

    Exit 1 when something got worse.
    """
    from qwen3_export.prove.baseline import compare_with_baseline, read_report
    from qwen3_export.prove.pair import may_be_worse
    from qwen3_export.prove.report import append_summary, write_report
    from qwen3_export.prove.tolerance import read_tolerance

    show = console(json, quiet, verbose)
    if output:
        check_output(output, [report, baseline, tolerance], force)
    old = read_report(baseline)
    result = compare_with_baseline(read_report(report), old, read_tolerance(tolerance), strict)
    for name in result["unpaired"]:
        show.say(f"note: {name} is new: the baseline does not have it")
    for item in old.get("failed") or ():
        show.say(f"note: {item['artifact']} was not measured in the baseline: {item['error']}")
    for item in filter(may_be_worse, result["pairs"]):
        why = item["reason"] or "its interval reaches into the tolerance"
        show.warn(
            f"{item['artifact']}: {item['metric']} went from {item['baseline']:.4g} to {item['value']:.4g}, beyond its "
            f"tolerance, but is inconclusive ({why}): more text or repeats decide it, --strict fails on it"
        )
    if output:
        write_report(output, result, force, title="Gate against a baseline")
    append_summary(result, "Gate against a baseline")
    show.result(result, lambda: _gated(result))
    if not result["passed"]:
        raise typer.Exit(1)


def _gated(result: dict[str, Any]) -> None:
    from qwen3_export.prove.report.tables import pairs_table

    shown = pairs_table(result)
    table(shown.headers, shown.rows)
    for item in result["pairs"]:
        if item["reason"]:
            tell(f"{item['artifact']}: {item['metric']} has no interval: {item['reason']}")
    tell(f"verdict: {result['verdict']}")


@app.command(epilog="Example: qwen3-export compare report-q4 report-q8 --report comparison")
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Report folders of validate or bench, or their report.json.")],
    output: Reports = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put candidates side by side, the Pareto front marked.

    Size, drift and speed come from reports of `validate` and `bench`.
    """
    from qwen3_export.prove.compare import compare as run
    from qwen3_export.prove.report import append_summary, write_report

    show = console(json, quiet, verbose)
    if output:
        check_output(output, reports, force)
    result = run(reports)
    for note in result["notes"]:
        show.warn(note)
    if output:
        write_report(output, result, force, title="Comparison")
    append_summary(result, "Comparison")
    show.result(result, lambda: _compared(result))


def _compared(result: dict[str, Any]) -> None:
    from qwen3_export.prove.report.tables import compare_table

    shown = compare_table(result)
    table(shown.headers, shown.rows)
