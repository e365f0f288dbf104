"""The command `bench`, which times artifacts on this device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import Console, size, table, tell
from qwen3_export.cli.prove import (
    Artifacts,
    ClusterOption,
    Nodes,
    Report,
    RunDevice,
    Texts,
    Threads,
    check_nodes,
    end,
    everywhere,
    find_all,
)
from qwen3_export.cli.validated import failed_notes, plan_note
from qwen3_export.errors import InputError


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--prompt-tokens {text}: numbers such as 128,512 were expected")
    return counts


@app.command(epilog="Example: qwen3-export bench model-onnx model.gguf --prompt-tokens 128,512 --new-tokens 32")
def bench(
    artifacts: Artifacts,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "128,512",
    new_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Tokens to decode after the shortest prompt.")
    ] = 64,
    threads: Threads = None,
    device: RunDevice = None,
    repeat: Annotated[int, typer.Option(min=1, max=10_000, help="Timed runs after one warm-up.")] = 5,
    gate: Annotated[Path | None, typer.Option(help="YAML or JSON file of limits; those on latency apply.")] = None,
    text: Texts = None,
    cluster: ClusterOption = None,
    node: Nodes = None,
    report: Report = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure speed, load time and peak memory on this device.

    Of several artifacts, one that fails stands in the report with its error, and the exit code is that of the error.
    """
    from qwen3_export.prove.latency import Workload, judged
    from qwen3_export.prove.latency import bench as run
    from qwen3_export.prove.report import append_summary, check_report, write_report

    show = console(json, quiet, verbose)
    workload = Workload(_counts(prompt_tokens), new_tokens, repeat, threads, tuple(text or ()), device)
    limits = _latency_limits(gate, show) if gate else {}
    check_nodes(cluster, node)
    paths = find_all(artifacts, device, False, cluster)
    if report:
        check_report(report, [*paths, gate], workload.texts, force)
    if cluster is None:
        result = judged(run(paths, workload, show), limits)
    else:
        from qwen3_export.prove.lab import LatencyRequest, measure_on_nodes

        request = LatencyRequest(replace(workload, texts=tuple(map(everywhere, workload.texts))), limits)
        result = measure_on_nodes(cluster, node or (), paths, request, show)
    if report:
        write_report(report, result, force, title="Latency")
    append_summary(result, "Latency")
    show.result(result, lambda: _benched(result))
    end(result)


def _latency_limits(gate: Path, show: Console) -> dict[str, float]:
    """A gate file's limits on latency; InputError when it has none."""
    from qwen3_export.prove.limits import is_latency, read_limits

    limits = read_limits(gate)
    mine = {name: value for name, value in limits.items() if is_latency(name)}
    if not mine:
        raise InputError(f"{gate}: it has no limit on latency", "validate checks limits on drift and size")
    if len(mine) < len(limits):
        show.say(f"note: {len(limits) - len(mine)} limits of {gate} are on drift or size: validate checks them")
    return mine


def _benched(result: dict[str, Any]) -> None:
    from qwen3_export.prove.gate import explain
    from qwen3_export.prove.report.tables import named

    rows = []
    for name, item in named(result):
        for index, prefill in enumerate(item["prefill"]):
            decode = item["decode"]
            rows.append(
                [
                    name if index == 0 else "",
                    item["runtime"] if index == 0 else "",
                    str(prefill["prompt_tokens"]),
                    f"{prefill['tokens_per_second']:.0f}",
                    f"{decode['tokens_per_second_p50']:.0f}" if index == 0 else "",
                    f"{1000 * decode['p99']:.1f}" if index == 0 else "",
                    f"{item['load_seconds']:.2f}" if index == 0 else "",
                    size(item["peak_rss_bytes"]) if index == 0 else "",
                ]
            )
    headers = ["artifact", "runtime", "prompt", "prefill tok/s", "decode tok/s", "p99 ms/tok", "load s", "peak memory"]
    if rows:
        table(headers, rows)
    failed_notes(result)
    for name, item in named(result):
        plan_note(name, item)
        for check in item.get("gate", {}).get("checks", ()):
            if not check["passed"]:
                tell(f"{name}: {explain(check)}")
