"""What a run needs before its first block: threads and a job.

`quantize` and the trials of `plan` (`preflight.timing`) begin in the same way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import HEAD
from qwen3_export.core.recipe import Recipe
from qwen3_export.model.workers import Workers, workers, workers_without_torch
from qwen3_export.solve.blocks import rtn_without_torch
from qwen3_export.solve.job import Job, QuantizeSettings
from qwen3_export.solve.methods import load_method
from qwen3_export.text.samples import Samples


def runs_without_torch(checkpoint: Checkpoint, recipe: Recipe, settings: QuantizeSettings) -> bool:
    """Whether the recipe only rounds to nearest on a CPU, which needs no torch."""
    return settings.device == "cpu" and rtn_without_torch.serves(checkpoint, recipe)


def has_head_apart(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether the head is quantized by itself, after the last block."""
    return not checkpoint.config.tie_word_embeddings and recipe.scheme_for(HEAD) is not None


def open_pool(settings: QuantizeSettings, without_torch: bool) -> AbstractContextManager[Workers]:
    """The threads of a run, with the fastest arithmetic of this processor."""
    return workers_without_torch(settings.threads) if without_torch else workers(settings.threads, fast=True)


def new_job(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples | None,
    settings: QuantizeSettings,
    pool: Workers,
    scratch: Path,
) -> Job:
    """The job of a run, whose activations go to `scratch`.

    Raises RecipeError for an unknown method or option.
    """
    method, options = load_method(recipe)
    without_torch = runs_without_torch(checkpoint, recipe, settings)
    device = settings.device
    return Job(checkpoint, recipe, method, options, samples, pool, scratch, device, without_torch=without_torch)
