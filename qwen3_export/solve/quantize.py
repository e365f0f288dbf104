"""`quantize`: source, recipe and calibration in; a QuantizedCheckpoint folder out."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qwen3_export import __version__
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.layouts import layout
from qwen3_export.core.manifest import refuse_existing, staged_folder
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError, MissingRuntimeError, RecipeError
from qwen3_export.model.workers import give_back, has_bf16, workers
from qwen3_export.solve.folder import QuantizedFolder
from qwen3_export.solve.head import solve_embedding, solve_head
from qwen3_export.solve.job import Job, Settings, SolvedBlock, SolvedLinear
from qwen3_export.solve.limits import check_disk, check_memory, hold_memory
from qwen3_export.solve.method import load_method
from qwen3_export.solve.outputs import measure
from qwen3_export.solve.record import linears_record, manifest_of, report_experts, result_of
from qwen3_export.solve.self_text import self_rows
from qwen3_export.solve.states import Shelf
from qwen3_export.solve.stream import embed_rows, forget_hidden, solve_block
from qwen3_export.text import ModelTokenizer, Rows, calibration_rows, load_documents


def quantize(
    checkpoint: Checkpoint, recipe: Recipe, output: Path, settings: Settings, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantize a checkpoint into the folder `output`; returns the result that `--json` prints.

    Raises RecipeError, InputError or ResourceError before the long work when it cannot succeed. A run
    that was stopped goes on from its last finished block and ends with the same bytes.
    """
    progress, started = progress or Progress(), time.monotonic()
    checkpoint.hash_ahead()
    refuse_existing(output.absolute(), settings.force)
    if checkpoint.is_quantized:
        raise InputError(f"{checkpoint.folder} is quantized already", "give the 16-bit original")
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            f"--device {settings.device}: this torch sees no CUDA device", "install a CUDA build of torch, or use cpu"
        )
    method, options = load_method(recipe)
    settings = replace(settings, layout=settings.layout or recipe.layout)
    assert settings.layout is not None
    recipe.check_against(checkpoint.config.all_matrices())
    _check_layout(checkpoint, recipe, settings.layout)
    rows = _calibration(checkpoint, recipe, settings, progress) if _needs_inputs(recipe, method, options) else None
    original = method.needs_original(options)
    floor = recipe.experts.floor(checkpoint.config.expert_width)
    outputs = method.needs_outputs(options)
    outer = any(recipe.scheme_for(module) for module in checkpoint.config.outer_matrices())
    check_memory(checkpoint.config, rows, original, settings.memory, floor, outputs, outer)
    identity = {
        "recipe": recipe.sha256,
        "calibration": rows.sha256 if rows else None,
        "seed": settings.seed,
        "layout": settings.layout,
        "version": __version__,
        # A run does not go on where its rows would be rounded in another way.
        "products": "bf16" if rows is not None and settings.device == "cpu" and has_bf16() else "fp32",
    }
    with staged_folder(output, settings.force, resume=True) as partial, workers(settings.threads, fast=True) as pool:
        config = checkpoint.config
        head_apart = not config.tie_word_embeddings and recipe.scheme_for(HEAD) is not None
        target = QuantizedFolder(partial, checkpoint, settings.layout, identity, head_apart)
        try:
            if not settings.resume:
                target.start_over()
            check_disk(checkpoint, recipe, rows, original, partial, outputs)
            job = Job(checkpoint, recipe, method, options, rows, pool, target.scratch, settings.device)
            found, resumed = _run(job, target, settings, progress)
            manifest = manifest_of(checkpoint, recipe, rows, settings, found)
            schemes = {name: QuantScheme.from_dict(item["scheme"]) for name, item in manifest["tensors"].items()}
            target.finish(recipe, manifest, schemes)
            if rows is not None:
                report_experts(manifest["experts"], progress)
        except Exception:
            target.drop_unless_resumable()
            raise
    return result_of(output, manifest, resumed, time.monotonic() - started)


def _needs_inputs(recipe: Recipe, method: ModuleType, options: Any) -> bool:
    """Whether the calibration rows must run through the model: for the method, a fold, or static input scales."""
    static = any(rule.scheme and rule.scheme.activations == "static-tensor" for rule in recipe.rules)
    return static or method.needs_inputs(options) or getattr(options, "fold", "none") != "none"


def _check_layout(checkpoint: Checkpoint, recipe: Recipe, name: str) -> None:
    """Raise RecipeError when the layout cannot hold what the recipe would make, before the long work."""
    chosen, matrices = layout(name), checkpoint.config.all_matrices()
    schemes = {module: scheme for module in matrices if (scheme := recipe.scheme_for(module))}
    for module, scheme in schemes.items():
        if reason := chosen.supports(scheme):
            raise RecipeError(
                f"{module} ({scheme.label}) does not fit the {name} layout: {reason}",
                "--layout compressed-tensors holds every scheme",
            )
        chosen.specs(module, matrices[module], scheme)
    chosen.config(schemes, list(checkpoint.config.all_linears()))


def _calibration(checkpoint: Checkpoint, recipe: Recipe, settings: Settings, progress: Progress) -> Rows:
    samples, length = settings.size(recipe)
    if length > checkpoint.config.max_position:
        raise InputError(f"--sequence-length {length}: the model has {checkpoint.config.max_position} positions")
    tokenizer = ModelTokenizer(checkpoint.folder)
    if settings.calibration == "self":
        return self_rows(checkpoint, tokenizer, samples, length, settings.seed, progress)
    documents = load_documents(settings.calibration)
    rows = calibration_rows(tokenizer, documents, samples, length, settings.seed)
    if max(int(ids.max()) for ids in rows.ids) >= checkpoint.config.vocab_size:
        raise InputError(f"{checkpoint.folder}: the tokenizer has more tokens than the model's vocabulary")
    if len(rows.ids) < samples:
        progress.warn(f"the calibration text gives {len(rows.ids)} rows of {length} tokens, {samples} were asked for")
    return rows


def _with_outputs(job: Job, seed: int, resumed: int, progress: Progress) -> Job:
    """The job with the outputs' importance measured, or found from an earlier run, if its method asks for it."""
    count, layers = job.method.needs_outputs(job.options), job.checkpoint.config.num_layers
    if not count or job.rows is None or resumed == layers:
        return job
    with progress.bar("which outputs matter", 2 * layers) as tick:
        found = measure(job.checkpoint, job.rows, count, seed, job.pool, job.scratch, job.device, tick)
    return replace(job, outputs=found)


def _run(job: Job, target: QuantizedFolder, settings: Settings, progress: Progress) -> tuple[dict[str, Any], int]:
    """Solve what is not done yet; returns the results of blocks, embedding and head, and how many blocks were there."""
    found = target.resume()
    blocks, resumed, layers = found["blocks"], len(found["blocks"]), job.checkpoint.config.num_layers
    if job.rows is not None:
        job = replace(job, shelf=Shelf(target.scratch / "shelf"))
    with ThreadPoolExecutor(1) as writer:
        written = None if blocks else _start(job, target, found, writer, progress)
        job = _with_outputs(job, settings.seed, resumed, progress)
        with progress.bar(f"quantize {job.checkpoint.name} ({job.recipe.name})", layers + target.head_apart) as tick:
            for layer in range(layers):
                if layer >= resumed:
                    solved = solve_block(job, layer)
                    if written is not None:
                        written.result()
                    linears = linears_record(job.recipe, solved.linears, progress)
                    blocks.append({"linears": linears, "expert_tokens": solved.expert_tokens})
                    done = {**found, "blocks": list(blocks)}
                    written = writer.submit(_keep_block, job, target, layer, solved, done)
                    if job.rows is not None:
                        # Hidden states before and after a block would be on the disk together for too long.
                        written.result()
                    hold_memory(settings.memory)
                tick()
            if written is not None:
                written.result()
            if target.head_apart:
                _finish_head(job, target, found, progress)
                hold_memory(settings.memory)
                tick()
    return found, resumed


def _start(
    job: Job, target: QuantizedFolder, found: dict[str, Any], writer: ThreadPoolExecutor, progress: Progress
) -> Future[None]:
    """Quantize the embedding if asked, and leave the rows' hidden states before block 0; the shard is being written."""
    embedding = None
    if job.recipe.scheme_for(EMBEDDING) is not None:
        with progress.bar("quantize the embedding", job.checkpoint.config.num_layers) as tick:
            embedding = solve_embedding(job, tick)
    found["outer"].update(_outer_result(job.recipe, embedding, progress))
    written = writer.submit(target.write_outer, embedding)
    if job.rows is not None:
        embed_rows(job, embedding.solved.tensor if embedding else None)
    return written


def _finish_head(job: Job, target: QuantizedFolder, found: dict[str, Any], progress: Progress) -> None:
    """The last step where the head is quantized by itself."""
    if HEAD in found["outer"]:
        return
    head = solve_head(job)
    assert head is not None
    target.write_head(head)
    found["outer"].update(_outer_result(job.recipe, head, progress))
    target.save_progress(found)


def _outer_result(recipe: Recipe, linear: SolvedLinear | None, progress: Progress) -> dict[str, Any]:
    return {} if linear is None else linears_record(recipe, {linear.solved.tensor.name: linear}, progress)


def _keep_block(job: Job, target: QuantizedFolder, layer: int, solved: SolvedBlock, done: dict[str, Any]) -> None:
    """Bring a block to the disk, then count it as done; while that lasts, the next one may be solved."""
    target.write_block(layer, solved)
    target.save_progress(done)
    if job.rows is not None:
        forget_hidden(job, layer)
        # Moments and states of all sizes leave holes; rounding alone reuses the same few pieces.
        give_back()
