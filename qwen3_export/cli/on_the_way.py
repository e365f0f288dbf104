"""Exports with `--recipe`: their options, and quantizing before the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_export.cli.app import complete_recipe
from qwen3_export.cli.console import Console
from qwen3_export.cli.solve import parse_bytes
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.disk import check_room
from qwen3_export.core.outputs import check_output, partial_path
from qwen3_export.core.process import uninterrupted
from qwen3_export.core.processors import MOST_THREADS, check_device_name
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.core.working_folders import quantized_path, working_folder
from qwen3_export.errors import InputError

if TYPE_CHECKING:
    from qwen3_export.solve.job import QuantizeSettings

RecipeOption = Annotated[
    str | None,
    typer.Option(help="Quantize a 16-bit source with this recipe first.", autocompletion=complete_recipe),
]
# Options of quantizing in an export. None means that an option was not given: `quantize`'s default holds.
Calibration = Annotated[str | None, typer.Option(help="With --recipe: as for quantize (default: bundled).")]
Samples = Annotated[int | None, typer.Option(min=1, max=1_000_000, help="With --recipe: calibration samples.")]
SequenceLength = Annotated[int | None, typer.Option(min=16, max=1 << 20, help="With --recipe: tokens per sample.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=(1 << 63) - 1, help="With --recipe: chooses the calibration samples.")
]
Memory = Annotated[str | None, typer.Option(help="With --recipe: refuse to start when more is needed, e.g. 8GiB.")]
Device = Annotated[str | None, typer.Option(help="With --recipe: `cpu` or `cuda`.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="With --recipe: threads of quantizing.")]
StudyThreads = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_THREADS, help="Of measuring level and cache, and with --recipe of quantizing (default: all)."
    ),
]
RoundingThreads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="Of rounding, and with --recipe of quantizing (default: all)."),
]
Resume = Annotated[
    bool | None, typer.Option("--resume/--no-resume", help="With --recipe: go on with an interrupted run.")
]
ScratchOption = Annotated[
    Path | None, typer.Option("--scratch", help="With --recipe: folder for activations, on another disk.")
]
# An export's own check: raises, or gives about the bytes that it will write.
Check = Callable[[Checkpoint], int]
_ROOM = "free some room, or write --output to another disk"


@dataclass(frozen=True)
class Quantizing:
    """`quantize`'s options in an export with a recipe; None where not given."""

    calibration: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    memory: str | None = None
    device: str | None = None
    threads: int | None = None
    resume: bool | None = None
    scratch: Path | None = None

    def settings(self, recipe: str | None) -> QuantizeSettings:
        """The settings of `quantize`.

        Raises InputError for options without a recipe, and for impossible values.
        """
        given: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        if recipe is None and given:
            raise InputError(
                f"--{next(iter(given)).replace('_', '-')} is about quantizing, and there is no --recipe",
                "add --recipe NAME, or leave it away",
            )
        check_device_name(given.get("device", "cpu"))
        if "memory" in given:
            given["memory"] = parse_bytes(given["memory"])
        from qwen3_export.solve.job import QuantizeSettings

        return QuantizeSettings(**given)


@contextmanager
def prepared(
    source: str,
    recipe: str | None,
    options: Quantizing,
    output: Path,
    force: bool,
    show: Console,
    check: Check,
    target: str,
    folder: bool = True,
    reads: Path | None = None,
) -> Iterator[Checkpoint]:
    """The checkpoint to export: the source, or with a recipe a quantized copy.

    The copy lies beside the output and is removed afterwards. When the command is interrupted, finished blocks, or the
    whole copy, stay in `OUTPUT.quantized.partial/`, and the same command goes on from there.

    `check` is the export's own check, made before anything is quantized; `target` is the plan's name of the format,
    whose memory counts against `--memory`; `folder` says whether the export writes a folder; `reads` are files that it
    reads beside the source. Raises ResourceError when the output's disk has too little room for copy and export.
    """
    checkpoint = open_source(source)
    inputs = [checkpoint.folder, recipe, options.calibration, reads]
    check_output(output, inputs, force, folder)
    settings = options.settings(recipe)
    if recipe is None:
        checkpoint.hash_ahead()
        size = check(checkpoint)
        check_room({partial_path(output): size}, {partial_path(output): _ROOM})
        yield checkpoint
        return
    with uninterrupted():
        from qwen3_export.preflight import check_target
        from qwen3_export.solve.preflight import artifact_bytes
        from qwen3_export.solve.quantize import quantize

    chosen = load_recipe(recipe)
    exported = check_target(checkpoint, chosen, settings, check, target)
    copy = artifact_bytes(checkpoint, chosen.for_model(checkpoint.config))
    needed = {quantized_path(output): copy, partial_path(output): exported}
    check_room(needed, dict.fromkeys(needed, _ROOM))
    with working_folder(output, "quantized", inputs) as working:
        quantized = working / checkpoint.name
        quantize(checkpoint, chosen, quantized, replace(settings, force=True, reuse=settings.resume), show)
        yield open_source(str(quantized))
