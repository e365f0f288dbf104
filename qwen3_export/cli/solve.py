"""The commands `inspect` and `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import (
    Cluster,
    Force,
    Json,
    Quiet,
    Recipe,
    Scratch,
    Source,
    Verbose,
    app,
    console,
)
from qwen3_export.cli.artifacts import describe_artifact, is_artifact, show_artifact
from qwen3_export.cli.console import fields, size
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.outputs import check_output
from qwen3_export.core.processors import MOST_THREADS, check_device_name
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.core.units import parse_size
from qwen3_export.errors import InputError

Inspected = Annotated[str, typer.Argument(help="A folder, a hub id, `reference-model`, or any file written here.")]


def parse_bytes(text: str) -> int:
    """Parse `8GiB`, `500MB` or a plain number of bytes."""
    count = parse_size(text)
    if count is None:
        raise InputError(f"--memory {text}: a size such as 8GiB was expected")
    return count


@app.command(epilog="Example: qwen3-export inspect reference-model")
def inspect(source: Inspected, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show what a checkpoint, an artifact or another file holds.

    Of a checkpoint its architecture, size, types and schemes, of an artifact its tensors, sizes and provenance. And
    what is in reference files, importance matrices, reports, Triton repositories and recipes.
    """
    path = Path(source)
    if is_artifact(path):
        found = describe_artifact(path)
        console(json, quiet, verbose).result(found, lambda: show_artifact(found))
        return
    values = describe(open_source(source))
    shown = {k: ", ".join(f"{a} ({b})" for a, b in v.items()) if isinstance(v, dict) else v for k, v in values.items()}
    console(json, quiet, verbose).result(values, lambda: fields(shown))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The values that `inspect` prints of a checkpoint."""
    config = checkpoint.config
    dtypes: dict[str, int] = {}
    for entry in checkpoint.stored_entries():
        dtypes[str(entry.dtype)] = dtypes.get(str(entry.dtype), 0) + 1
    schemes: dict[str, int] = {}
    for scheme in checkpoint.schemes.values():
        schemes[scheme.label] = schemes.get(scheme.label, 0) + 1
    return {
        "source": checkpoint.name,
        "architecture": config.model_type,
        "parameters": config.num_parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}"
        + (f", factor {config.rope.factor:g}" if config.rope.kind == "yarn" else ""),
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "tied_head": config.tie_word_embeddings,
        "embedding": _stored_as(checkpoint, EMBEDDING),
        "lm_head": "tied to the embedding" if config.tie_word_embeddings else _stored_as(checkpoint, HEAD),
        "dtypes": dtypes,
        "quantized": schemes,
        "bits_per_weight": round(checkpoint.bits_per_weight, 3),
        "linear_bits_per_weight": round(checkpoint.linear_bits_per_weight, 3),
    }


def _stored_as(checkpoint: Checkpoint, module: str) -> str:
    """The scheme of embedding or head where it is quantized, else its dtype."""
    scheme = checkpoint.schemes.get(module)
    return scheme.label if scheme else str(checkpoint.entry(f"{module}.weight").dtype)


@app.command(
    epilog="Example: qwen3-export quantize reference-model --recipe gptq-w4a16-g128 --output quantized "
    "--samples 32 --sequence-length 256. On all nodes of a Ray cluster: … --cluster 10.0.0.1:6379"
)
def quantize(
    source: Source,
    recipe: Recipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    calibration: Annotated[
        str,
        typer.Option(
            help="`bundled`, `self` (the model writes it), a .txt/.jsonl/.parquet file, or hf:DATASET[:SPLIT]."
        ),
    ] = "bundled",
    samples: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Calibration samples (default: the recipe's).")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=16, max=1 << 20, help="Tokens per sample (default: the recipe's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Chooses the calibration samples.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Refuse to start when more is needed, e.g. 8GiB. With --cluster local:N the workers count too, "
            "on other nodes each by itself."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Default: all. Never changes the bytes.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="`compressed-tensors`, `gptq`, `awq` or `fp8` (default: the recipe's)."),
    ] = None,
    scratch: Scratch = None,
    cluster: Cluster = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run.")] = True,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a checkpoint into a folder, block by block.

    An interrupted run goes on where it stopped when the command is repeated.
    """
    chosen, checkpoint = load_recipe(recipe), open_source(source)
    limit = parse_bytes(memory) if memory else None
    check_output(output, [checkpoint.folder, recipe, calibration], force)
    check_device_name(device)
    checkpoint.hash_ahead()
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize as run

    show = console(json, quiet, verbose)
    settings = QuantizeSettings(
        calibration,
        samples,
        sequence_length,
        seed,
        limit,
        device,
        threads,
        resume,
        force,
        layout,
        scratch,
        cluster=cluster,
    )
    result = run(checkpoint, chosen, output, settings, show)
    show.result(result, lambda: _quantized(result))


def _quantized(result: dict[str, Any]) -> None:
    worst = max(result["layers"], key=lambda layer: layer["error"])
    fields(
        {
            "output": result["output"],
            "recipe": result["recipe"],
            "quantized matrices": result["tensors"],
            "bits per weight": f"{result['bits_per_weight']:.2f} in all, "
            f"{result['linear_bits_per_weight']:.2f} linears",
            "size": size(result["bytes"]),
            "largest error": f"{worst['error']:.2e} ({worst['name']})",
            "time": f"{result['seconds']:.1f} s",
            "peak memory": size(result["peak_rss_bytes"]),
            "resumed blocks": result["resumed_blocks"],
            **({"workers": len(result["workers"])} if "workers" in result else {}),
        }
    )
