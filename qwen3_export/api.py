"""The Python interface: the command line's work as functions.

    import qwen3_export
    result = qwen3_export.quantize("Qwen/Qwen3-0.6B", "gptq-w4a16-g128", "quantized", samples=64)
    qwen3_export.validate(["quantized"], "Qwen/Qwen3-0.6B", max_kl=0.05)      shows itself as a table in a notebook

`progress` is called as `progress(what, done, total)`. What goes wrong is an `errors.ExportError` with a hint.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from qwen3_export.errors import InputError
from qwen3_export.result import Result

if TYPE_CHECKING:
    from qwen3_export.core.progress import Progress
    from qwen3_export.ship.gguf import Options
    from qwen3_export.ship.tensorrt.profiles import Profile

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
OnProgress = Callable[[str, int, int], None]
FORMATS = ("onnx", "gguf", "tensorrt")


def refuse_unknown(function: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for an unknown keyword, with the nearest known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise InputError(f"{function} takes no {name!r}", hint)


def _named(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """The function, with InputError in place of TypeError for a misspelt keyword."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*values: Arguments.args, **named: Arguments.kwargs) -> Answer:
        refuse_unknown(f"{function.__name__}()", list(named), known)
        return function(*values, **named)

    return call


def _progress(report: OnProgress | None) -> Progress:
    from qwen3_export.core.progress import Progress

    class Calls(Progress):
        """Every step of a bar is a call."""

        @contextmanager
        def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
            done = 0

            def tick() -> None:
                nonlocal done
                done += 1
                if report is not None:
                    report(label, done, total)

            yield tick

    return Calls()


@_named
def quantize(
    source: str | Path,
    recipe: str,
    output: str | Path,
    *,
    calibration: str = "bundled",
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    resume: bool = True,
    force: bool = False,
    layout: str | None = None,
    scratch: str | Path | None = None,
    cluster: str | None = None,
    progress: OnProgress | None = None,
) -> Result:
    """Quantize `source` into the folder `output`.

    `memory` is a limit in bytes, `scratch` a folder for activations. `cluster` is `local`, `local:N` or a Ray cluster's
    HOST:PORT, whose nodes share the work.
    Returns what `qwen3-export quantize --json` prints; raises `errors.ExportError`.
    """
    from qwen3_export.core.recipe import load_recipe
    from qwen3_export.core.source import open_source
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize as run

    settings = QuantizeSettings(
        calibration=calibration, samples=samples, sequence_length=sequence_length, seed=seed, memory=memory,
        device=device, threads=threads, resume=resume, force=force, layout=layout,
        scratch=None if scratch is None else Path(scratch), cluster=cluster,
    )  # fmt: skip
    return Result(run(open_source(str(source)), load_recipe(recipe), Path(output), settings, _progress(progress)))


@_named
def plan(
    source: str | Path,
    recipe: str,
    *,
    formats: Sequence[str] = (),
    samples: int | None = None,
    sequence_length: int | None = None,
    memory: int | None = None,
    nodes: int = 1,
    output: str | Path | None = None,
    scratch: str | Path | None = None,
    measure: bool = True,
    progress: OnProgress | None = None,
) -> Result:
    """Say what a recipe needs here and where its result can go.

    `measure` times the recipe on a block of random numbers; `nodes` like this one share the work.
    `output` and `scratch` are where files would go. Returns what `qwen3-export plan --json` prints.
    """
    from qwen3_export.core.recipe import load_recipe
    from qwen3_export.core.source import open_source
    from qwen3_export.preflight import plan as run
    from qwen3_export.solve.job import QuantizeSettings

    place, spilled = (None if path is None else Path(path) for path in (output, scratch))
    settings = QuantizeSettings(samples=samples, sequence_length=sequence_length, memory=memory, scratch=spilled)
    given = open_source(str(source)), load_recipe(recipe), formats, settings, measure, _progress(progress)
    return Result(run(*given, nodes, place))


@_named
def export(
    source: str | Path,
    output: str | Path,
    format: Literal["onnx", "gguf", "tensorrt"],
    *,
    target: str | None = None,
    flavor: str | None = None,
    precision: str | None = None,
    accuracy_level: int | None = None,
    kv_cache: str | None = None,
    opset: int | None = None,
    max_shard_size: int | None = None,
    type_name: str | None = None,
    options: Options | None = None,
    engine: str | None = None,
    capabilities: Sequence[str] | None = None,
    profile: Profile | None = None,
    onnx_only: bool | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Result:
    """Write `source` as `onnx`, `gguf` or `tensorrt`.

    `target` to `max_shard_size` (bytes) are the options of `onnx`, `type_name` and `options` those of `gguf`, `engine`,
    `precision`, `capabilities`, `profile` and `onnx_only` those of `tensorrt`. Returns what the command of that name
    prints with `--json`; raises `errors.ExportError`.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: one of {', '.join(FORMATS)} was expected")
    values = {
        "target": target, "flavor": flavor, "precision": precision, "accuracy_level": accuracy_level,
        "kv_cache": kv_cache, "opset": opset, "max_shard_size": max_shard_size, "type_name": type_name,
        "options": options, "engine": engine, "capabilities": capabilities, "profile": profile,
        "onnx_only": onnx_only,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    write = getattr(importlib.import_module(f"qwen3_export.ship.{format}"), f"export_{format}")
    known = [name for name in inspect.signature(write).parameters if name in values]
    refuse_unknown(f"export to {format}", list(given), known)
    if format == "onnx":
        from qwen3_export.prove.cache import cache_cost, cache_scales
        from qwen3_export.prove.rounding import level_cost

        given |= {"measure": level_cost, "study_cache": (cache_scales, cache_cost)}
    from qwen3_export.core.places import file_place
    from qwen3_export.core.source import open_source

    place = file_place(str(output)) if format == "gguf" else Path(output)
    return Result(write(open_source(str(source)), place, force=force, progress=_progress(progress), **given))


@_named
def validate(
    artifacts: str | Path | Sequence[str | Path],
    reference: str | Path,
    *,
    text: Sequence[str] = (),
    tokens: int | None = None,
    tasks: str | Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    exact: bool = False,
    max_kl: float | None = None,
    max_kl_p99: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    max_bytes: float | str | None = None,
    max_extra_loops: int | None = None,
    min_expert_tokens: int | None = None,
    max_experts_below_floor: int | None = None,
    gate: str | Path | None = None,
    explain: bool = False,
    on: str = "mean",
    report: str | Path | None = None,
    card: bool = False,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Result:
    """Measure artifacts against a reference file or the original.

    Limits are those of a gate file, given one by one or as the file `gate`. `report` writes a report folder, `card`
    the measured table into each artifact folder's model card; `explain` traces drift through a folder.
    Returns `{results, failed, passed}` as `qwen3-export validate --json` prints. Of several artifacts, one that fails
    stands in `failed` with its error; one alone raises it, an `errors.ExportError`.
    """
    from qwen3_export.prove.limits import parse_limit, read_limits
    from qwen3_export.prove.naming import artifact_paths
    from qwen3_export.prove.report import check_report, write_report
    from qwen3_export.prove.tasks import read_tasks
    from qwen3_export.prove.validate import open_reference
    from qwen3_export.prove.validate import validate as run
    from qwen3_export.run.session import RuntimeOptions

    given: dict[str, Any] = {
        "max_kl": max_kl,
        "max_kl_p99": max_kl_p99,
        "min_top1": min_top1,
        "max_ppl_ratio": max_ppl_ratio,
        "max_bytes": max_bytes,
        "max_extra_loops": max_extra_loops,
        "min_expert_tokens": min_expert_tokens,
        "max_experts_below_floor": max_experts_below_floor,
    }
    limits = read_limits(Path(gate)) if gate else {}
    limits.update({name: parse_limit(name, value) for name, value in given.items() if value is not None})
    show, paths = _progress(progress), artifact_paths(artifacts)
    asked = read_tasks(Path(tasks)) if tasks else ()
    if report:
        check_report(report, [*paths, reference, gate, tasks], text, force)
    truth = open_reference(str(reference), text, tokens, show)
    options = RuntimeOptions(threads=threads, exact=exact, device=device)
    result = run(paths, truth, limits, options, show, on, asked, explain)
    if report:
        write_report(Path(report), result, force)
    if card:
        from qwen3_export.core.model_card import update_cards

        update_cards(result)
    return Result(result)


@_named
def bench(
    artifacts: str | Path | Sequence[str | Path],
    *,
    prompt_tokens: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    repeat: int = 5,
    threads: int | None = None,
    device: str | None = None,
    texts: Sequence[str] = (),
    report: str | Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Result:
    """Time artifacts on this device: load, prompts of `prompt_tokens`, `new_tokens` decoded after the shortest.

    Returns `{results, failed, passed}` as `qwen3-export bench --json` prints. Of several artifacts, one that fails
    stands in `failed` with its error; one alone raises it, an `errors.ExportError`.
    """
    from qwen3_export.prove.latency import Workload
    from qwen3_export.prove.latency import bench as run
    from qwen3_export.prove.naming import artifact_paths
    from qwen3_export.prove.report import check_report, write_report

    workload = Workload(tuple(prompt_tokens), new_tokens, repeat, threads, tuple(texts), device)
    paths = artifact_paths(artifacts)
    if report:
        check_report(report, paths, texts, force)
    result = run(paths, workload, _progress(progress))
    if report:
        write_report(Path(report), result, force, title="Latency")
    return Result(result)
