"""The command `calibrate`, which measures an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import (
    Force,
    Json,
    Quiet,
    SampleCount,
    SampleLength,
    SampleSeed,
    Scratch,
    Source,
    Verbose,
    app,
    console,
)
from qwen3_export.cli.console import fields, size
from qwen3_export.core.outputs import check_output
from qwen3_export.core.places import file_place
from qwen3_export.core.processors import MOST_THREADS, check_device_name
from qwen3_export.core.source import open_source


@app.command(epilog="Example: qwen3-export calibrate reference-model --output imatrix.gguf --samples 16")
def calibrate(
    source: Source,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=file_place, metavar="<path>", help="File to write, e.g. imatrix.gguf."),
    ],
    calibration: Annotated[str, typer.Option(help="As for quantize.")] = "bundled",
    samples: SampleCount = 128,
    sequence_length: SampleLength = 512,
    seed: SampleSeed = 0,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Default: all. Never changes the bytes.")
    ] = None,
    scratch: Scratch = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure an importance matrix, for `gguf --imatrix`.

    It is in llama.cpp's own format, so its quantizer takes it too.
    """
    checkpoint = open_source(source)
    check_output(output, [checkpoint.folder, calibration], force, folder=False)
    check_device_name(device)
    checkpoint.hash_ahead()
    from qwen3_export.model.workers import import_torch

    import_torch()
    from qwen3_export.solve.importance import calibrate as run
    from qwen3_export.solve.job import QuantizeSettings

    show = console(json, quiet, verbose)
    settings = QuantizeSettings(
        calibration, samples, sequence_length, seed, device=device, threads=threads, force=force, scratch=scratch
    )
    result = run(checkpoint, output, settings, show)
    show.result(result, lambda: _calibrated(result))


def _calibrated(result: dict[str, Any]) -> None:
    experts = result["experts"]
    fields(
        {
            "output": result["output"],
            "tensors": result["tensors"],
            "measured on": f"{result['samples']} samples of {result['sequence_length']} tokens",
            **({} if experts is None else {"fewest tokens of an expert": experts["min_tokens"]}),
            "size": size(result["bytes"]),
            "time": f"{result['seconds']:.1f} s",
            "peak memory": size(result["peak_rss_bytes"]),
        }
    )
