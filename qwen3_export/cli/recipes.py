"""The commands `recipes list`, `recipes show` and `recipes search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qwen3_export.cli.app import (
    Cluster,
    Force,
    Json,
    Quiet,
    SampleCount,
    SampleLength,
    SampleSeed,
    Scratch,
    Source,
    Verbose,
    complete_recipe,
    console,
    recipes,
)
from qwen3_export.cli.console import fields, size, table, yaml_text
from qwen3_export.core.outputs import check_output, staged_file
from qwen3_export.core.places import file_place
from qwen3_export.core.processors import MOST_THREADS
from qwen3_export.core.recipe import load_recipe, recipe_names
from qwen3_export.core.source import open_source
from qwen3_export.core.unread import no_effect
from qwen3_export.core.working_folders import scratch_folder
from qwen3_export.errors import InputError


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
        typer.Option(
            "--output",
            "-o",
            parser=file_place,
            metavar="PATH",
            help="YAML file to write (default: NAME-mixed-BPWbpw.yaml).",
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="`bundled`, a .txt/.jsonl/.parquet file, or hf:DATASET.")
    ] = "bundled",
    samples: SampleCount = 128,
    sequence_length: SampleLength = 512,
    seed: SampleSeed = 0,
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
    groups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Sizes of groups that are tried below 8 bits (default: 128,64,32)."),
    ] = None,
    by_kind: Annotated[
        bool,
        typer.Option("--by-kind/--by-layer", help="One scheme per kind of linear in all layers, for other models too."),
    ] = False,
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
    from qwen3_export.solve.mixed_precision.candidates import GROUPS
    from qwen3_export.solve.mixed_precision.result import outcome, to_yaml
    from qwen3_export.solve.mixed_precision.search import SearchSettings, search

    show = console(json, quiet, verbose)
    if "gguf" in _words(grids) and (warning := no_effect({"groups": groups}, "ggml's types have blocks of their own")):
        show.warn(warning)
    settings = SearchSettings(
        target_bpw,
        None if bits is None else _numbers("--bits", bits),
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
        GROUPS if groups is None else _numbers("--groups", groups),
        by_kind,
    )
    inputs: list[str | Path | None] = [checkpoint.folder, calibration]
    with staged_file(path, force, inputs) as partial, scratch_folder(scratch, path, inputs) as spilled:
        found = search(checkpoint, settings, spilled or partial.parent, show)
        partial.write_text(to_yaml(found.recipe), encoding="utf-8")
    values = outcome(found, target_bpw, path)
    show.result(values, lambda: _searched(values, embeddings))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"{option} {text}: numbers such as 4,8 were expected")
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
