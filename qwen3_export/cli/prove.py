"""The commands `reference` and `validate`, which compare artifacts with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, OutputFile, Quiet, Verbose, app, console
from qwen3_export.cli.console import Console, fields, size
from qwen3_export.cli.validated import validated
from qwen3_export.core.outputs import check_output
from qwen3_export.core.processors import MOST_THREADS
from qwen3_export.core.source import locate, open_source
from qwen3_export.errors import InputError
from qwen3_export.text.documents import split_domain

Artifacts = Annotated[list[str], typer.Argument(help="ONNX, TensorRT or Hugging Face folders, or .gguf files.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text in place of the bundled one: FILE or DOMAIN=FILE; repeatable."),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=64,
        max=1_000_000_000,
        help="Use about so many tokens of the text, in whole rows of up to 256 tokens: at least one row.",
    ),
]
Report = Annotated[Path | None, typer.Option(help="Folder for report.json, .md, .html and .xml (JUnit).")]
ThinkingBudget = Annotated[
    int | None,
    typer.Option(min=1, max=1 << 20, help="Chats: end a thought after so many tokens, as Qwen3 describes it."),
]
Tasks = Annotated[Path | None, typer.Option(help="JSONL file of tasks with answers; see `qwen3-export tasks`.")]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Measure on nodes of a Ray cluster: HOST:PORT, or local[:N]."),
]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--node", help="With --cluster: on a node that offers this resource, such as jetson; repeatable."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of the runtime (default: all that may be used).")
]
RunDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu; cuda, rtx: ONNX Runtime's providers; plan: TensorRT (default: a plan where it can run, else cpu).",
    ),
]


def find_all(artifacts: list[str], device: str | None, exact: bool, cluster: str | None) -> list[Path]:
    """Paths of artifacts, checked here unless they run on other nodes."""
    if cluster is None:
        return [find(artifact, device, exact) for artifact in artifacts]
    return [path if (path := Path(artifact)).exists() else locate(artifact) for artifact in artifacts]


def everywhere(text: str) -> str:
    """FILE or DOMAIN=FILE with an absolute path, so that other nodes find it."""
    domain, file = split_domain(text)
    place = str(Path(file).absolute()) if Path(file).exists() else file
    return f"{domain}={place}" if domain else place


def check_nodes(cluster: str | None, nodes: list[str] | None) -> None:
    """Check `--cluster` and `--node` before the work, and raise what is wrong."""
    if cluster is not None:
        from qwen3_export.cluster.session import check_cluster

        check_cluster(cluster)
    elif nodes:
        raise InputError(f"--node {nodes[0]}: nodes are those of a cluster", "give --cluster HOST:PORT too")


def find(artifact: str, device: str | None = None, exact: bool = False) -> Path:
    """An artifact's path, also of `reference-model` or a hub id.

    Raises InputError when no runtime takes it, MissingRuntimeError when the device is missing.
    """
    from qwen3_export.run.artifact import check_runnable
    from qwen3_export.run.devices import check_device

    check_device(device)
    path = Path(artifact)
    found = path if path.exists() else locate(artifact)
    check_runnable(found, device, exact)
    return found


@app.command(epilog="Example: qwen3-export reference reference-model --output original.safetensors")
def reference(
    source: Annotated[str, typer.Argument(help="A folder, a hub id, `reference-model`; a reference file to merge.")],
    output: OutputFile,
    text: Texts = None,
    merge: Annotated[
        list[Path] | None, typer.Option(help="SOURCE is a reference file: add the rows of this one; repeatable.")
    ] = None,
    tokens: Tokens = None,
    window: Annotated[
        int | None, typer.Option(min=32, max=1 << 20, help="Tokens per row (default: 256, or what the model takes).")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, max=1 << 20, help="Most likely tokens kept per position; 0 keeps all (default: 256)."),
    ] = None,
    thinking_budget: ThinkingBudget = None,
    tasks: Tasks = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the original's answers to a portable file.

    Held-out text, the most likely tokens at every position of it, and greedy texts: what `validate` compares with.
    """
    from qwen3_export.prove.original import TOP_K, write_reference
    from qwen3_export.prove.tasks import read_tasks
    from qwen3_export.prove.validate import WINDOW, held_out

    show = console(json, quiet, verbose)
    if merge:
        _refuse_measuring(text=text, tokens=tokens, window=window, top_k=top_k, budget=thinking_budget, tasks=tasks)
        _merge([Path(source), *merge], output, force, show)
        return
    checkpoint = open_source(source)
    asked = read_tasks(tasks) if tasks else ()
    most = checkpoint.config.max_position
    if window is not None and window > most:
        raise InputError(f"--window {window}: the model has {most} positions", f"--window {most}, or less")
    inputs = [checkpoint.folder, tasks, *(split_domain(item)[1] for item in text or ())]
    check_output(output, inputs, force, folder=False)
    rows = held_out(checkpoint.folder, text or (), window or min(WINDOW, most), tokens)
    result = write_reference(
        checkpoint, rows, output, TOP_K if top_k is None else top_k, force, show, thinking_budget, asked
    )
    shown = {k: result[k] for k in ("output", "positions", "rows", "top_k")} | {"size": size(result["bytes"])}
    show.result(result, lambda: fields(shown))


def _refuse_measuring(**options: Any) -> None:
    """Raise InputError for options of measuring, which merging does not do."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        name = {"budget": "thinking-budget"}.get(given[0], given[0].replace("_", "-"))
        raise InputError(
            f"--{name}: --merge joins answers that are measured already", "leave it away, or measure without --merge"
        )


def _merge(paths: list[Path], output: Path, force: bool, show: Console) -> None:
    from qwen3_export.prove.merging import merge_references

    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file", "--merge takes reference files, and SOURCE is one too")
    check_output(output, paths, force, folder=False)
    result = merge_references(paths, output, force)
    shown = {k: result[k] for k in ("output", "positions", "rows", "top_k")} | {"size": size(result["bytes"])}
    show.result(result, lambda: fields(shown))


@app.command(epilog="Example: qwen3-export validate model-onnx --reference original.safetensors --max-kl 0.05")
def validate(
    artifacts: Artifacts,
    reference: Annotated[str, typer.Option(help="A reference file, or the original itself.")],
    gate: Annotated[Path | None, typer.Option(help="YAML or JSON file of limits.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL, nats per token.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Smallest share of equal top tokens.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Largest perplexity ratio.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Largest size on disk, such as 9MB.")] = None,
    on: Annotated[str, typer.Option(help="What must hold: `mean`, or `upper`, the bad end of its interval.")] = "mean",
    text: Texts = None,
    tokens: Tokens = None,
    thinking_budget: ThinkingBudget = None,
    tasks: Tasks = None,
    exact: Annotated[bool, typer.Option("--exact", help="The runtime's highest-precision mode.")] = False,
    threads: Threads = None,
    device: RunDevice = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Trace drift to blocks, linears, experts and channels of a folder.")
    ] = False,
    cluster: ClusterOption = None,
    node: Nodes = None,
    report: Report = None,
    card: Annotated[bool, typer.Option("--card", help="Write the figures into each folder's model card.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy drift in the artifact's own runtime.

    Exit 1 when a limit is exceeded. Of several artifacts, one that fails stands in the report with its error, and the
    exit code is that of the error.
    """
    from qwen3_export.prove.gate import CHOICES
    from qwen3_export.prove.limits import parse_limit, read_limits
    from qwen3_export.prove.report import append_summary, check_report, write_report
    from qwen3_export.prove.tasks import read_tasks
    from qwen3_export.prove.validate import open_reference
    from qwen3_export.prove.validate import validate as run
    from qwen3_export.run.session import RuntimeOptions

    show, limits = console(json, quiet, verbose), read_limits(gate) if gate else {}
    given = {"max_kl": max_kl, "min_top1": min_top1, "max_ppl_ratio": max_ppl_ratio, "max_bytes": max_bytes}
    limits.update({name: parse_limit(name, value) for name, value in given.items() if value is not None})
    if on not in CHOICES:
        raise InputError(f"--on {on}: mean or upper was expected")
    check_nodes(cluster, node)
    paths = find_all(artifacts, device, exact, cluster)
    asked = read_tasks(tasks) if tasks else ()
    if report:
        check_report(report, [*paths, reference, gate, tasks], text or (), force)
    truth = open_reference(reference, text or (), tokens, show, thinking_budget)
    options = RuntimeOptions(threads=threads, exact=exact, device=device)
    if cluster is None:
        result = run(paths, truth, limits, options, show, on, asked, explain)
    else:
        from qwen3_export.prove.lab import DriftRequest, measure_on_nodes

        place, texts = _place_of(reference), tuple(everywhere(item) for item in text or ())
        request = DriftRequest(place, texts, tokens, thinking_budget, limits, options, on, asked, explain)
        result = measure_on_nodes(cluster, node or (), paths, request, show)
    if report:
        write_report(report, result, force)
    if card:
        _write_cards(result, show)
    append_summary(result, "Validation")
    if note := _kl_note(result, truth.is_lower_bound and "max_kl" in limits):
        show.say(f"note: {note}")
    show.result(result, lambda: validated(result))
    end(result)


def end(result: dict[str, Any]) -> None:
    """Raise what a command ends with after its report.

    The error of an artifact that was not measured, or Exit where a gate failed.
    """
    from qwen3_export.prove.failed import first_error

    if error := first_error(result):
        raise error
    if not result["passed"]:
        raise typer.Exit(1)


def _place_of(reference: str) -> str:
    """Where a reference file, or the original's folder, lies for other nodes."""
    place = Path(reference) if Path(reference).is_file() else locate(reference)
    return str(place.absolute())


def _write_cards(result: dict[str, Any], show: Console) -> None:
    """Write the figures into the model cards of the folders that have one."""
    from qwen3_export.core.model_card import update_cards

    show.note(f"model cards written: {', '.join(update_cards(result)) or 'none, no artifact has one'}")


def _kl_note(result: dict[str, Any], weak: bool) -> str | None:
    """A note on a KL that is no exact one; None when it is."""
    if not result["results"]:
        return None
    if weak:
        return "the reference keeps the likeliest tokens only: KL is a lower bound, a pass of max_kl is weak"
    if not all(item["kl_estimate"] for item in result["results"]):
        return None
    worst = max(item["kl_estimate"]["stderr"] for item in result["results"])
    return f"KL is estimated from the tokens that the reference file keeps, give or take {worst:.1g} nats"
