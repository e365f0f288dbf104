"""The commands `inspect`, `quantize` and `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

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
    complete_recipe,
    console,
    recipes,
)
from qwen3_export.cli.artifacts import describe_artifact, is_artifact, show_artifact
from qwen3_export.cli.console import fields, size, table, yaml_text
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.outputs import check_output, staged_file
from qwen3_export.core.processors import MOST_THREADS, check_device_name
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.recipe import load_recipe, recipe_names
from qwen3_export.core.source import open_source
from qwen3_export.core.units import parse_size
from qwen3_export.core.working_folders import scratch_folder
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
    memory: Annotated[str | None, typer.Option(help="Refuse to start when more is needed, e.g. 8GiB.")] = None,
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


@recipes.command("list", epilog="Example: qwen3-export recipes list")
def list_recipes(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the shipped recipes."""
    found = [load_recipe(name) for name in recipe_names()]
    values = {"recipes": [{"name": r.name, "method": r.method, "description": r.description} for r in found]}
    rows = [[r.name, r.description, r.method] for r in found]
    console(json, quiet, verbose).result(values, lambda: table(["recipe", "what it does", "method"], rows))


@recipes.command("show", epilog="Example: qwen3-export recipes show gptq-w4a16-g128")
def show_recipe(
    name: Annotated[
        str, typer.Argument(help="A shipped recipe's name, or a YAML file.", autocompletion=complete_recipe)
    ],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a recipe as YAML: a start for your own."""
    values = load_recipe(name).to_dict()
    console(json, quiet, verbose).result(values, lambda: print(yaml_text(values), end=""))


@recipes.command("search", epilog="Example: qwen3-export recipes search reference-model --target-bpw 4.5")
def search_recipe(
    source: Source,
    target_bpw: Annotated[
        float, typer.Option(help="Bits per weight, scales included, of the decoder's linears (see --embeddings).")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads this annotation at run time)
        typer.Option("--output", "-o", help="YAML file to write (default: NAME-mixed-BPWbpw.yaml)."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="`bundled`, a .txt/.jsonl/.parquet file, or hf:DATASET.")
    ] = "bundled",
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Calibration samples.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=16, max=1 << 20, help="Tokens per sample.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Chooses the calibration samples.")] = 0,
    measure_rows: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Further rows, that the KL is measured on.")
    ] = 16,
    method: Annotated[str, typer.Option(help="`gptq`, `awq` or `rtn`.")] = "gptq",
    bits: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What may be mixed: 2, 3, 4, 8 and 16, with gguf 5 and 6 too (default: 4,8; gguf: 3 to 8)."),
    ] = None,
    grids: Annotated[
        str,
        typer.Option(help="Below 8 bits: `symmetric`, `signed` scales, `asymmetric`; or `gguf`: ggml types."),
    ] = "signed,asymmetric",
    fused: Annotated[
        bool, typer.Option("--fused/--separate", help="One scheme for q,k,v and one for gate,up, as vLLM needs it.")
    ] = False,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings/--no-embeddings", help="Quantize and count embedding and head too, tied or not."),
    ] = False,
    fold: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="`awq` moves scales between neighbours first, `none` does not (default: awq; rtn: none)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Default: all. Never changes the recipe.")
    ] = None,
    scratch: Scratch = None,
    cluster: Cluster = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the mixed-precision recipe that loses least at a size."""
    checkpoint = open_source(source)
    path = output or Path(f"{checkpoint.name}-mixed-{target_bpw:g}bpw.yaml")
    check_output(path, [checkpoint.folder, calibration], force, folder=False)
    from qwen3_export.model.workers import import_torch

    import_torch()
    from qwen3_export.solve.mixed_precision.search import SearchSettings, outcome, search, to_yaml

    show = console(json, quiet, verbose)
    settings = SearchSettings(
        target_bpw,
        None if bits is None else _bits(bits),
        _words(grids),
        method,
        calibration,
        samples,
        sequence_length,
        seed,
        measure_rows,
        fused,
        threads,
        embeddings,
        fold,
        cluster,
    )
    inputs: list[str | Path | None] = [checkpoint.folder, calibration]
    with staged_file(path, force, inputs) as partial, scratch_folder(scratch, path, inputs) as spilled:
        found = search(checkpoint, settings, spilled or partial.parent, show)
        partial.write_text(to_yaml(found.recipe), encoding="utf-8")
    values = outcome(found, settings, path)
    show.result(values, lambda: _searched(values, embeddings))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _bits(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"--bits {text}: numbers of bits such as 4,8 were expected")
    return tuple(int(word) for word in words)


def _searched(values: dict[str, Any], embeddings: bool) -> None:
    shares: dict[str, int] = {}
    for unit in values["units"]:
        shares[unit["scheme"]] = shares.get(unit["scheme"], 0) + unit["weights"]
    total, uniform = sum(shares.values()), values["expected_uniform_kl"]
    counted = "linears, embedding and head" if embeddings else "the decoder's linears"
    schemes = ", ".join(f"{label} {count / total:.0%}" for label, count in sorted(shares.items()))
    fields(
        {
            "output": values["output"],
            "bits per weight": f"{values['bits_per_weight']:.3f} ({counted}, scales included)",
            "schemes": schemes,
            "sum of single KLs": f"{values['expected_kl']:.5f}"
            + (f", {values['expected_kl'] / uniform:.2f} times the best single scheme of this size" if uniform else ""),
            "time": f"{values['seconds']:.1f} s",
            "peak memory": size(values["peak_rss_bytes"]),
        }
    )
