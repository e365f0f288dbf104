"""The Typer application, and the options and display that all commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from qwen3_export import __version__
from qwen3_export.cli.console import Console
from qwen3_export.core.places import file_place

# In the order in which a newcomer needs them.
ORDER = (
    *("demo", "inspect", "plan", "recipes", "quantize", "calibrate", "onnx", "gguf", "tensorrt", "triton"),
    *("reference", "tasks", "validate", "bench", "run", "compare", "gate"),
)


class _InOrder(TyperGroup):
    """A command group that lists its commands in this order, not that of imports."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="qwen3-export",
    cls=_InOrder,
    help="Take a Qwen3 checkpoint to an edge device, and prove that it arrived intact.",
    epilog="Start with `qwen3-export demo`, which does everything on a small model that comes along.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="List, show and search recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no log lines.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log every step; tracebacks on errors.")]
Source = Annotated[str, typer.Argument(help="A folder, a hub id, or `reference-model`.")]
SampleCount = Annotated[int, typer.Option(min=1, max=1_000_000, help="Calibration samples.")]
SampleLength = Annotated[int, typer.Option(min=16, max=1 << 20, help="Tokens per sample.")]
SampleSeed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Chooses the calibration samples.")]
Scratch = Annotated[
    Path | None, typer.Option(help="Folder for activations, on another disk than the output (default: beside it).")
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Share the work by Ray: HOST:PORT, or local[:N] for N workers here. Never changes the result."),
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", parser=file_place, metavar="<path>", help="File to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that begin with the text; the shell completes files itself."""
    from qwen3_export.core.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Recipe = Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.", autocompletion=complete_recipe)]


def console(json: bool, quiet: bool, verbose: bool) -> Console:
    """The display of one command."""
    return Console(json=json, quiet=quiet, verbose=verbose)


def _version(value: bool) -> None:
    if value:
        print(f"qwen3-export {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        Optional[bool],  # noqa: UP045  (typer reads this annotation at run time)
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = None,
) -> None:
    pass
