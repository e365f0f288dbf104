"""`plan`: what a recipe needs, and where its result can go.

Nothing is written.

    __init__    the answer: reasons, memory, disk, time
    exports     the memory of writing an ONNX or GGUF
    formats     every format's verdict and size
    limits      what is needed, beside the memory and the disks that there are
    runtimes    what each runtime takes of a recipe's schemes
    timing      the recipe itself on a block of random numbers, timed on this machine

This package may import both solving and shipping, which never import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.gguf_fallbacks import recipe_fallbacks
from qwen3_export.core.memory import available_bytes
from qwen3_export.core.places import absolute_place
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import ExportError, InputError, RecipeError
from qwen3_export.preflight.exports import check_export, export_peak
from qwen3_export.preflight.formats import (
    EXPORTS,
    FORMATS,
    Verdict,
    as_quantized,
    folder_of,
    formats_with,
    unsupported_tensors,
)
from qwen3_export.preflight.limits import (
    Needs,
    build_limits,
    described,
    disk_limits,
    disks_of,
    memory_limits,
    with_exports,
)
from qwen3_export.preflight.runtimes import RUNTIMES
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.methods import load_method
from qwen3_export.text.samples import Samples

MOST_NODES = 10_000
T = TypeVar("T")


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    formats: Sequence[str] = (),
    settings: QuantizeSettings | None = None,
    measure: bool = True,
    progress: Progress | None = None,
    nodes: int = 1,
    output: Path | None = None,
) -> dict[str, Any]:
    """What a recipe needs and where its result can go, as `--json` prints it.

    All `formats` must work; without any, one format is enough. `measure` times the recipe on random numbers; `nodes`
    like this one share the work (`--cluster`), and each needs the memory. The result would go to `output`, and so would
    exports to the formats.
    A recipe that cannot work raises no error: `possible` and `reasons` say so.
    """
    settings, progress = settings or QuantizeSettings(), progress or Progress()
    free = available_bytes()  # before this process takes some itself
    if not 1 <= nodes <= MOST_NODES:
        raise InputError(f"--nodes {nodes}: between 1 and {MOST_NODES} were expected")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"--format {unknown[0]}: one of {', '.join(FORMATS)} was expected")
    place = None if output is None else absolute_place(output)
    others, recipe = recipe_fallbacks(recipe, checkpoint.config).warning(), recipe.for_model(checkpoint.config)
    reasons = _recipe_reasons(checkpoint, recipe)
    fits = not reasons
    folder, checks = folder_of(settings.layout or recipe.layout), formats_with(settings.layout or recipe.layout)
    quantized = as_quantized(checkpoint, recipe)
    held = {name: check(quantized) if fits else Verdict(reasons[0]) for name, check in checks.items()}
    found = build_limits(_with_more(held, quantized, recipe, settings, others) if fits else held, settings, free)
    if fits and (reason := found[folder].reason):
        reasons.append(reason)
    reasons += [f"{name}: {found[name].reason}" for name in formats if found[name].reason and name != folder]
    needs = Needs()
    if fits and not found[folder].reason:
        with _collecting(reasons):
            needs = _needs(checkpoint, recipe, settings, measure and not reasons, progress, nodes)
        reasons += memory_limits(needs, settings, free)
        needs = with_exports(needs, [found[name] for name in set(formats) & set(EXPORTS)])
    disks = disks_of(needs, settings, nodes, place)
    reasons += disk_limits(needs, disks, settings)
    return {
        "possible": not reasons,
        "reasons": reasons,
        "source": checkpoint.name,
        "recipe": recipe.name,
        "peak_rss_bytes": needs.peak_rss_bytes,
        "disk_bytes": needs.disk_bytes,
        "disks": described(disks),
        "seconds": needs.seconds,
        "nodes": nodes,
        "formats": {name: verdict.to_dict() for name, verdict in found.items()},
        "runtimes": {name: _runtime(rule(quantized, found)) for name, rule in RUNTIMES.items()},
        "tensors": unsupported_tensors(quantized, held) if fits else [],
    }


def _with_more(
    held: dict[str, Verdict], quantized: Checkpoint, recipe: Recipe, settings: QuantizeSettings, others: str | None
) -> dict[str, Verdict]:
    """The formats' verdicts with the memory that writing them takes.

    Those of GGUF get a note on `others`, the types that rows are too narrow for.
    """
    left = _left_behind(quantized, recipe, settings)
    found = dict(held)
    for name, verdict in held.items():
        if verdict.reason is None:
            peak = export_peak(quantized, name, left, settings.threads)
            note = others if name in ("ggml", "gguf") else verdict.note
            found[name] = replace(verdict, peak_rss_bytes=peak, note=note)
    return found


def _left_behind(quantized: Checkpoint, recipe: Recipe, settings: QuantizeSettings) -> int:
    """Bytes that the process still holds when the recipe has been solved."""
    from qwen3_export.solve.memory import left_behind
    from qwen3_export.solve.quantize import needs_inputs
    from qwen3_export.solve.setup import runs_without_torch

    original = replace(quantized, schemes={})
    (count, length), without_torch = settings.size(recipe), runs_without_torch(original, recipe, settings)
    samples = Samples((np.zeros(length, np.int32),) * count, ("",) * count)
    inputs = samples if needs_inputs(recipe, *load_method(recipe)) else None
    return left_behind(_solving_peak(original, recipe, inputs, without_torch), without_torch)


def _solving_peak(checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, without_torch: bool) -> int:
    """Peak memory of solving a recipe."""
    from qwen3_export.solve.preflight import memory_needed

    method, options = load_method(recipe)
    floor = recipe.experts.token_floor(checkpoint.config.expert_width)
    outer = any(recipe.scheme_for(module) for module in checkpoint.config.outer_matrices())
    beside = method.needs_original(options), floor, method.fisher_samples(options), outer
    return memory_needed(checkpoint.config, samples, *beside, without_torch)


def _runtime(reason: str | None) -> dict[str, Any]:
    return {"supported": reason is None, "reason": reason}


class _collecting:  # noqa: N801  (used as a statement)
    """Adds an error inside the block to the reasons."""

    def __init__(self, reasons: list[str]) -> None:
        self._reasons = reasons

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, ExportError):
            self._reasons.append(str(error))
        return isinstance(error, ExportError)


def _recipe_reasons(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Why the recipe cannot be solved on this model, rule by rule."""
    reasons: list[str] = []
    if checkpoint.is_quantized:
        return [f"{checkpoint.name} is quantized already: give the 16-bit original"]
    per_reason: dict[str, list[str]] = {}
    for name, shape in checkpoint.config.all_matrices().items():
        scheme = recipe.scheme_for(name)
        try:
            if scheme is not None:
                scheme.check_shape(name, shape)
        except RecipeError as error:
            reason = str(error).removeprefix(f"{name}: ")
            per_reason.setdefault(reason, []).append(name)
    for reason, tensors in per_reason.items():
        others = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        reasons.append(f"{tensors[0]}{others}: {reason}")
    if not reasons:
        with _collecting(reasons):
            recipe.check_against(checkpoint.config.all_matrices())
    return reasons


def _needs(
    checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings, measure: bool, progress: Progress, nodes: int
) -> Needs:
    """Memory and disk by calculation, time by a trial on this machine.

    Raises the errors that the run would raise.
    """
    from qwen3_export.model.workers import import_torch
    from qwen3_export.solve.blocks import rtn_without_torch
    from qwen3_export.solve.preflight import activation_bytes, artifact_bytes
    from qwen3_export.solve.quantize import check_device, check_recipe, samples_needed

    check_recipe(checkpoint, recipe, settings.layout or recipe.layout)
    without_torch = settings.device == "cpu" and rtn_without_torch.serves(checkpoint, recipe)
    if not without_torch:
        import_torch()
        check_device(settings.device)
    method, options = load_method(recipe)
    samples = samples_needed(checkpoint, recipe, settings, progress, planned_samples)
    original, outputs = method.needs_original(options), method.fisher_samples(options)
    memory = _solving_peak(checkpoint, recipe, samples, without_torch)
    artifact = artifact_bytes(checkpoint, recipe)
    activations = activation_bytes(checkpoint, recipe, samples, original, outputs)
    seconds = None
    if measure:
        from qwen3_export.preflight.timing import estimate_seconds

        seconds = estimate_seconds(checkpoint, recipe, samples, settings, progress, nodes)
    return Needs(memory, artifact, activations, seconds=seconds)


def planned_samples(checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings, progress: Progress) -> Samples:
    """The calibration samples of the run; zeros where the text is not available yet."""
    from qwen3_export.solve.quantize import calibration_of

    count, length = settings.size(recipe)
    if settings.calibration == "self" or settings.calibration.startswith("hf:"):
        return Samples((np.zeros(length, np.int32),) * count, ("",) * count)
    return calibration_of(checkpoint, recipe, settings, progress)


def check_target(
    checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings, check: Callable[[Checkpoint], T], target: str
) -> T:
    """Check recipe, model and target before an export quantizes; raises the first error.

    `check` is the export's own check of a quantized checkpoint and of its options, whose answer is returned; `target`
    is the name among `FORMATS` of what is written, whose memory counts too.
    """
    from qwen3_export.solve.quantize import check_recipe, needs_inputs

    recipe = recipe.for_model(checkpoint.config)
    check_recipe(checkpoint, recipe, settings.layout or recipe.layout)
    quantized = as_quantized(checkpoint, recipe)
    answer = check(quantized)
    if settings.memory is not None:
        left = _left_behind(quantized, recipe, settings)
        check_export(export_peak(quantized, target, left, settings.threads), settings.memory)
    _, length = settings.size(recipe)
    if length > checkpoint.config.max_position and needs_inputs(recipe, *load_method(recipe)):
        raise InputError(f"--sequence-length {length}: the model has {checkpoint.config.max_position} positions")
    return answer
