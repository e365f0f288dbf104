"""`quantize`: source, recipe and calibration in; a QuantizedCheckpoint folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qwen3_export import __version__
from qwen3_export.cluster.session import check_cluster
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.disk import check_room, stored_bytes
from qwen3_export.core.gguf_fallbacks import recipe_fallbacks
from qwen3_export.core.layouts import layout
from qwen3_export.core.outputs import check_output, partial_path, staged_folder
from qwen3_export.core.processors import check_device_name
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.text_files import warn_of_text_files
from qwen3_export.core.unread import no_effect
from qwen3_export.core.working_folders import scratch_folder
from qwen3_export.errors import InputError, MissingRuntimeError, RecipeError
from qwen3_export.model.workers import fast_matmul, import_torch
from qwen3_export.solve.blocks import rtn_without_torch
from qwen3_export.solve.job import Job, QuantizeSettings
from qwen3_export.solve.loop import run_blocks
from qwen3_export.solve.method import fold_of
from qwen3_export.solve.methods import load_method
from qwen3_export.solve.output_folder import PROGRESS, STATE, QuantizedFolder, resumable
from qwen3_export.solve.preflight import check_disk, check_memory
from qwen3_export.solve.record import finished_run, manifest_of, report_experts, result_of
from qwen3_export.solve.setup import has_head_apart, new_job, open_pool, runs_without_torch
from qwen3_export.text.documents import check_readable, load_documents
from qwen3_export.text.samples import Samples, calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from qwen3_export.solve.cluster import Cluster

# Methods that know ggml's block types.
_BLOCK_METHODS = ("rtn", "gptq")


def quantize(
    checkpoint: Checkpoint, recipe: Recipe, output: Path, settings: QuantizeSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantize a checkpoint into the folder `output`; returns the result that `--json` prints.

    Raises RecipeError, InputError or ResourceError before the long work when it cannot succeed. A run
    that was stopped goes on from its last finished block and ends with the same bytes.
    """
    progress, started = progress or Progress(), time.monotonic()
    recipe = _spelled_out(recipe, checkpoint, progress)
    if settings.cluster is not None:
        check_cluster(settings.cluster)
    checkpoint.hash_ahead()
    inputs = (checkpoint.folder, settings.calibration)
    check_output(output, inputs, settings.force)
    settings = replace(settings, layout=settings.layout or recipe.layout)
    assert settings.layout is not None
    check_recipe(checkpoint, recipe, settings.layout)
    without_torch = runs_without_torch(checkpoint, recipe, settings)
    _import_libraries(without_torch, settings.device)
    method, options = load_method(recipe)
    samples = samples_needed(checkpoint, recipe, settings, progress, calibration_of)
    original, fisher_samples = method.needs_original(options), method.fisher_samples(options)
    outer = any(recipe.scheme_for(module) for module in checkpoint.config.outer_matrices())
    needed = check_memory(
        checkpoint.config, samples, original, settings.memory, _workers_here(settings),
        recipe.experts.token_floor(checkpoint.config.expert_width), fisher_samples, outer, without_torch,
    )  # fmt: skip
    if settings.reuse and (done := finished_run(output, checkpoint, recipe, samples, settings)):
        progress.note("everything is quantized already")
        return result_of(output, done, checkpoint.config.num_layers, time.monotonic() - started)
    identity, head_apart = _identity(recipe, samples, settings), has_head_apart(checkpoint, recipe)
    state = partial_path(output) / STATE
    staged = staged_folder(output, settings.force, inputs, lambda error: resumable(state, error))
    # Entered before the output: what is wrong with it leaves an unfinished run as it is.
    spilled = scratch_folder(settings.scratch, output, inputs, lambda _: (state / PROGRESS).is_file())
    with spilled as activations, staged as partial, open_pool(settings, without_torch) as pool:
        target = QuantizedFolder(partial, checkpoint, settings.layout, identity, head_apart, activations)
        if not settings.resume:
            target.start_over()
        check_disk(checkpoint, recipe, samples, original, partial, fisher_samples, activations)
        job = new_job(checkpoint, recipe, samples, settings, pool, target.scratch)
        with _executor(job, target, settings, needed, progress) as executor:
            found, resumed = run_blocks(job, target, settings, progress, executor)
            workers_found = None if executor is None else executor.summary()
        manifest = _finish(target, job, settings, found, progress)
    result = result_of(output, manifest, resumed, time.monotonic() - started)
    return result if workers_found is None else {**result, "workers": workers_found}


def _workers_here(settings: QuantizeSettings) -> int:
    """Workers that `--cluster` starts on this machine."""
    if settings.cluster is None:
        return 0
    from qwen3_export.solve.cluster import workers_here

    return workers_here(settings.cluster, settings)


def _spelled_out(recipe: Recipe, checkpoint: Checkpoint, progress: Progress) -> Recipe:
    """The recipe with its file type as rules.

    Warns of types that the model's rows cannot have, and of tokenizer files that are missing or broken.
    """
    if (warning := recipe_fallbacks(recipe, checkpoint.config).warning()) is not None:
        progress.warn(warning)
    warn_of_text_files(checkpoint.folder, checkpoint.name, progress)
    return recipe.for_model(checkpoint.config)


def _finish(
    target: QuantizedFolder, job: Job, settings: QuantizeSettings, found: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Complete the folder with its manifest, which is returned."""
    libraries = ["numba"] if job.without_torch else ["torch", "numba"]
    manifest = manifest_of(job.checkpoint, job.recipe, job.samples, settings, found, libraries)
    schemes = {name: QuantScheme.from_dict(item["scheme"]) for name, item in manifest["tensors"].items()}
    target.finish(job.recipe, manifest, schemes)
    if job.samples is not None:
        report_experts(manifest["experts"], progress)
    return manifest


def _import_libraries(without_torch: bool, device: str) -> None:
    """Import what the run needs; MissingRuntimeError where it is not installed."""
    if without_torch:
        rtn_without_torch.import_loops()
    else:
        import_torch()
        check_device(device)


def _identity(recipe: Recipe, samples: Samples | None, settings: QuantizeSettings) -> dict[str, Any]:
    """Everything that decides the bytes beside the checkpoint.

    A stopped run goes on only if it is equal.
    """
    return {
        "recipe": recipe.sha256,
        "calibration": samples.sha256 if samples else None,
        "seed": settings.seed,
        "layout": settings.layout,
        "version": __version__,
        # Calibration samples are rounded in the arithmetic of the processor.
        "matmul": fast_matmul() if samples is not None and settings.device == "cpu" else "fp32",
    }


@contextmanager
def _executor(
    job: Job, target: QuantizedFolder, settings: QuantizeSettings, needed: int, progress: Progress
) -> Iterator[Cluster | None]:
    """Workers on a cluster where they are asked for; None for this process."""
    if settings.cluster is None:
        yield None
        return
    from qwen3_export.solve.cluster import Run, open_cluster
    from qwen3_export.solve.cluster.room import pieces_bytes

    # What an earlier run left is checked, or cleared away, before anybody works on it.
    target.resume()
    folder, layout_name = target.folder.absolute(), target.layout
    source, samples, apart = job.checkpoint.folder.absolute(), job.samples, target.head_apart
    scratch = target.scratch.absolute()
    if samples is not None:
        pieces = {scratch: stored_bytes(scratch) + pieces_bytes(job.checkpoint.config, len(job.models) > 1)}
        check_room(pieces, {scratch: "the pieces of one block must fit: free some room, or give another --scratch"})
    run = Run(source, job.recipe, samples, settings, folder, scratch, layout_name, apart, job.without_torch)
    with open_cluster(settings.cluster, run, needed, job.checkpoint, progress) as cluster:
        yield cluster


def check_recipe(checkpoint: Checkpoint, recipe: Recipe, layout_name: str) -> None:
    """Check model, recipe and layout before the long work, without torch.

    Raises InputError or RecipeError with the first thing that does not fit.
    """
    if checkpoint.is_quantized:
        raise InputError(f"{checkpoint.folder} is quantized already", "give the 16-bit original")
    recipe.check_against(checkpoint.config.all_matrices())
    _check_layout(checkpoint, recipe, layout_name)


def check_device(device: str) -> None:
    """Raise InputError for an unknown device, MissingRuntimeError when torch cannot use it."""
    check_device_name(device)
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            f"--device {device}: this torch sees no CUDA device", "install a CUDA build of torch, or use cpu"
        )
    if device != "cpu":
        # torch loads its library of factorisations at the first one, and fails where two threads have theirs at once.
        torch.linalg.inv(torch.eye(2, device=device))


def needs_inputs(recipe: Recipe, method: ModuleType, options: Any) -> bool:
    """Whether the calibration samples must run through the model.

    The method, a fold, or calibrated input scales need that.
    """
    measured = any(rule.scheme and rule.scheme.has_input_scale for rule in recipe.rules)
    return measured or method.needs_inputs(options) or fold_of(options) != "none"


SamplesOf = Callable[[Checkpoint, Recipe, QuantizeSettings, Progress], Samples]


def samples_needed(
    checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings, progress: Progress, samples_of: SamplesOf
) -> Samples | None:
    """The calibration rows, None for a recipe that reads none.

    Of such a recipe options about them are warned of.
    """
    if needs_inputs(recipe, *load_method(recipe)):
        return samples_of(checkpoint, recipe, settings, progress)
    _tell_unread(recipe, settings, progress)
    return None


def _tell_unread(recipe: Recipe, settings: QuantizeSettings, progress: Progress) -> None:
    """Warn of calibration options that a recipe without calibration does not read.

    Raises InputError for a file that is not there.
    """
    check_readable(settings.calibration)
    usual = QuantizeSettings()
    names = ("calibration", "samples", "sequence_length", "seed", "scratch")
    chosen = {name: getattr(settings, name) for name in names}
    given = {name: None if value == getattr(usual, name) else value for name, value in chosen.items()}
    if warning := no_effect(given, f"{recipe.name} reads no calibration text"):
        progress.warn(warning)


def _check_layout(checkpoint: Checkpoint, recipe: Recipe, name: str) -> None:
    """Raise RecipeError when the layout cannot hold what the recipe makes."""
    chosen, matrices = layout(name), checkpoint.config.all_matrices()
    schemes = {module: scheme for module in matrices if (scheme := recipe.scheme_for(module))}
    for module, scheme in schemes.items():
        if scheme.ggml_type is not None and recipe.method not in _BLOCK_METHODS:
            raise RecipeError(
                f"{module} ({scheme.label}): method {recipe.method} does not solve block types of ggml",
                f"use method: {' or '.join(_BLOCK_METHODS)}",
            )
        if reason := chosen.supports(scheme):
            raise RecipeError(
                f"{module} ({scheme.label}) does not fit the {name} layout: {reason}",
                _layout_hint(scheme, set(schemes.values())),
            )
        chosen.specs(module, matrices[module], scheme)
    chosen.config(schemes, list(checkpoint.config.all_linears()))


def _layout_hint(scheme: QuantScheme, schemes: Collection[QuantScheme]) -> str:
    """What helps where a scheme does not fit: another layout, or another scheme."""
    for name in ("compressed-tensors", "ggml"):
        if not any(layout(name).supports(other) for other in schemes):
            return f"use layout {name}: it holds every scheme of the recipe"
    if scheme.type == "int" and not scheme.per_row:
        return "use strategy: group or channel"
    return "no layout holds all schemes of the recipe together: use others"


def calibration_of(checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings, progress: Progress) -> Samples:
    """The calibration rows that the settings ask for.

    Raises InputError when there is no text for them.
    """
    count, length = settings.size(recipe)
    if length > checkpoint.config.max_position:
        raise InputError(f"--sequence-length {length}: the model has {checkpoint.config.max_position} positions")
    tokenizer = ModelTokenizer(checkpoint.folder)
    if settings.calibration == "self":
        from qwen3_export.solve.calibration.self_generated import self_generated_samples

        return self_generated_samples(checkpoint, tokenizer, count, length, settings.seed, progress)
    documents = load_documents(settings.calibration)
    samples = calibration_samples(tokenizer, documents, count, length, settings.seed)
    if max(int(ids.max()) for ids in samples.ids) >= checkpoint.config.vocab_size:
        raise InputError(f"{checkpoint.folder}: the tokenizer has more tokens than the model's vocabulary")
    if len(samples.ids) < count:
        progress.warn(
            f"the calibration text gives {len(samples.ids)} samples of {length} tokens, {count} were asked for"
        )
    return samples
