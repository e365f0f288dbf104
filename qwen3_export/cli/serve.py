"""The command `triton`, which writes a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import fields, size


@app.command(epilog="Example: qwen3-export triton model-onnx --output repository --name qwen3")
def triton(
    artifact: Annotated[Path, typer.Argument(help="ONNX or TensorRT folder, .gguf file, quantized folder for vLLM.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model repository to write.")],
    name: Annotated[str, typer.Option(help="The model's name in the server.")] = "qwen3",
    instances: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each copy (default: all processors).")] = None,
    sequences: Annotated[
        int | None,
        typer.Option(help="Answers that one copy decodes together (ONNX folders: 8; GGUF files, plans: one)."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait in each copy; more are refused.")] = 64,
    mount: Annotated[str, typer.Option(help="Where the server sees the repository; vLLM's path to the model.")] = (
        "/models"
    ),
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model repository for Triton Inference Server.

    It generates text: streaming, chat template, sampling, a bounded queue.
    """
    from qwen3_export.preflight.served import check_startable
    from qwen3_export.ship.triton import export_triton
    from qwen3_export.ship.triton.artifact import kind_of
    from qwen3_export.ship.triton.config import Serving

    show = console(json, quiet, verbose)
    serving = Serving(instances, threads, sequences, queue)
    check_startable(kind_of(artifact).name, artifact)
    result = export_triton(artifact, output, name, serving, mount, force, show)
    show.result(result, lambda: _written(result))


def _written(result: dict[str, Any]) -> None:
    fields(
        {
            "repository": result["output"],
            "model": f"{result['model']} ({result['backend']} backend)",
            "size": size(sum(item["bytes"] for item in result["files"])),
            "server's Python needs": result["requirements"],
            "start": result["start"],
        }
    )
