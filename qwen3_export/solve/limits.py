"""Will it fit? Memory and disk of a quantization run, estimated before it starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.solve.stream import TOKENS_AT_ONCE
from qwen3_export.text import Rows

# Python, torch, and what the allocator keeps of freed pieces; measured on Linux with torch 2.13.
_BASE_BYTES = 700 << 20


def memory_needed(config: Qwen3Config, rows: Rows | None, original: bool = False) -> int:
    """Estimated peak memory in bytes: one block in fp32, and the largest linear's work on top.

    `original`: the original model runs beside the quantized one, with a block and moments of its own.
    """
    layers = range(config.num_layers)
    block = max(sum(math.prod(shape) for shape in config.linear_shapes(layer).values()) for layer in layers)
    shapes = [shape for layer in layers for shape in set(config.linear_shapes(layer).values())]
    largest, widest = max(math.prod(shape) for shape in shapes), max(shape[1] for shape in shapes)
    # Weight, codes, scales and zeros per column, rest: about five matrices while one linear is solved.
    total = 4 * (block + 5 * largest)
    if rows is not None:
        # Moments of two sets of rows and their mean; damped, permuted and inverse Hessian, its factor.
        squares = 14 if original else 8
        total += 4 * (squares * widest * widest + 3 * TOKENS_AT_ONCE * widest)
        total += 4 * block if original else 0
        total += 2 * config.vocab_size * config.hidden_size
    return total + _BASE_BYTES


def check_memory(config: Qwen3Config, rows: Rows | None, original: bool, limit: int | None) -> None:
    """Raise InputError when the run needs more than `--memory`."""
    needed = memory_needed(config, rows, original)
    if limit is not None and needed > limit:
        raise InputError(
            f"this run needs about {needed / 2**30:.2f} GiB of memory, --memory allows {limit / 2**30:.2f} GiB",
            "allow more; one block and the work on its largest linear must fit",
        )


def disk_needed(checkpoint: Checkpoint, recipe: Recipe, rows: Rows | None, original: bool = False) -> int:
    """Estimated bytes in OUTPUT.partial at its fullest: the artifact and the activations, of both models."""
    config = checkpoint.config
    total = sum(entry.end - entry.begin for entry in checkpoint.stored_entries())
    total += sum(path.stat().st_size for path in checkpoint.sidecars())
    for name, shape in config.all_linears().items():
        if scheme := recipe.scheme_for(name):
            entry = checkpoint.entry(f"{name}.weight")
            total += int(math.prod(shape) * scheme.bits_per_weight(shape) / 8) - (entry.end - entry.begin)
    if rows is not None:
        widest = max(shape[1] for layer in range(config.num_layers) for shape in config.linear_shapes(layer).values())
        per_token = 3 * config.hidden_size + widest * (1 + max(config.experts_per_token, 1))
        total += 4 * rows.tokens * per_token * (2 if original else 1)
    return total


def check_disk(checkpoint: Checkpoint, recipe: Recipe, rows: Rows | None, original: bool, partial: Path) -> None:
    """Raise ResourceError when the file system has too little room for the run."""
    present = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed, free = disk_needed(checkpoint, recipe, rows, original) - present, shutil.disk_usage(partial).free
    if needed > free:
        raise ResourceError(
            f"{partial.parent}: about {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free",
            "free some room, or write --output to another disk",
        )
