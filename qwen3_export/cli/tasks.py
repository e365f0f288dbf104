"""The command `tasks`, which makes tasks for `validate --tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen3_export.cli.app import Force, Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import fields
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.places import file_place


@app.command(epilog="Example: qwen3-export tasks --output tasks.jsonl --count 60 --kinds arithmetic,copying,json")
def tasks(
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=file_place, metavar="<path>", help="JSONL file to write.")
    ],
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many tasks.")] = 60,
    kinds: Annotated[str, typer.Option(help="Of `arithmetic`, `copying` and `json`, in turn.")] = (
        "arithmetic,copying,json"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed makes the same tasks.")] = 0,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make tasks with right answers, for `validate --tasks`.

    Arithmetic, copying and JSON; `reference --tasks` keeps what the original makes of them.
    """
    from qwen3_export.prove.task_generator import generate_tasks, to_jsonl
    from qwen3_export.prove.tasks import tasks_sha256

    made = generate_tasks(count, seed, tuple(kind.strip() for kind in kinds.split(",") if kind.strip()))
    with staged_file(output, force) as partial:
        partial.write_text(to_jsonl(made), encoding="utf-8")
    values = {"output": str(output), "tasks": len(made), "seed": seed, "sha256": tasks_sha256(made)}
    console(json, quiet, verbose).result(values, lambda: fields(values))
