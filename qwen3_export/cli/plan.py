"""The command `plan`: what a recipe needs, and which formats can hold its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Json, Quiet, Recipe, Scratch, Source, Verbose, app, console
from qwen3_export.cli.console import fields, size, table, tell
from qwen3_export.cli.solve import parse_bytes
from qwen3_export.core.processors import MOST_THREADS, check_device_name
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError


@app.command(epilog="Example: qwen3-export plan reference-model --recipe gptq-w4a16-g128 --format onnx --memory 8GiB")
def plan(
    source: Source,
    recipe: Recipe,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="A format that must hold the result; repeatable.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Impossible when more is needed, e.g. 8GiB.")] = None,
    calibration: Annotated[str, typer.Option(help="As for quantize.")] = "bundled",
    samples: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Calibration samples (default: the recipe's).")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=16, max=1 << 20, help="Tokens per sample (default: the recipe's).")
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, max=10_000, help="Machines like this one that share the work (--cluster).")
    ] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Where the result would go: its disk must have the room (default: here).")
    ] = None,
    scratch: Scratch = None,
    layout: Annotated[str | None, typer.Option(help="Of the quantized folder (default: the recipe's).")] = None,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Default: all.")] = None,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Time the recipe on a block of random numbers.")
    ] = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say whether a recipe can work, and what it needs here.

    It tells how large the result gets, and exits with 2 when it cannot work.
    """
    check_device_name(device)
    chosen, checkpoint = load_recipe(recipe), open_source(source)
    limit = parse_bytes(memory) if memory else None
    from qwen3_export.preflight import plan as run
    from qwen3_export.solve.job import QuantizeSettings

    show = console(json, quiet, verbose)
    settings = QuantizeSettings(
        calibration, samples, sequence_length, 0, limit, device, threads, layout=layout, scratch=scratch
    )
    result = run(checkpoint, chosen, tuple(formats or ()), settings, time, show, nodes, output)
    show.result(result, lambda: _planned(result, formats or ()))
    if reasons := result["reasons"]:
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise InputError(f"it cannot work: {reasons[0]}{more}")


def _planned(result: dict[str, Any], asked: Sequence[str]) -> None:
    """Print the plan of the formats asked for and the runtimes that read them."""
    known = {
        "possible": "yes" if result["possible"] else "no",
        "peak memory": _size(result["peak_rss_bytes"]),
        **_disks(result),
        "time": "-" if result["seconds"] is None else f"about {result['seconds']:.0f} s",
        **({"nodes": result["nodes"]} if result["nodes"] > 1 else {}),
    }
    from qwen3_export.preflight.runtimes import READ_BY

    fields(known)
    rows = [
        [name, "yes" if item["supported"] else "no", _size(item["bytes"]), item["reason"] or item.get("note") or ""]
        for name, item in result["formats"].items()
        if not asked or name in asked
    ]
    rows += [
        [name, "yes" if item["supported"] else "no", "", item["reason"] or ""]
        for name, item in result["runtimes"].items()
        if not asked or set(READ_BY[name]) & set(asked)
    ]
    table(["format or runtime", "works", "size", "why not"], rows)
    for reason in result["reasons"]:
        tell(f"not possible: {reason}")


def _disks(result: dict[str, Any]) -> dict[str, str]:
    """What is needed on each disk, and what is free there."""
    disks = result["disks"]
    if not disks:
        return {"disk": _size(result["disk_bytes"])}
    shown = [f"{size(disk['bytes'])}, {size(disk['free_bytes'])} free in {disk['path']}" for disk in disks]
    return {"disk" if number == 0 else f"disk {number + 1}": text for number, text in enumerate(shown)}


def _size(count: int | None) -> str:
    return "-" if count is None else size(count)
