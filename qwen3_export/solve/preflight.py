"""Will it fit? Memory and disk of a quantization run, estimated before it starts."""

from __future__ import annotations

import math
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.disk import check_room
from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.units import binary_size
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.solve.calibration.measured_outputs import measured_rows
from qwen3_export.solve.chunk_sizes import FOLD_EVERY, OUTPUT_PIECE
from qwen3_export.solve.memory import memory_parts
from qwen3_export.solve.method import fold_of
from qwen3_export.solve.methods import load_method
from qwen3_export.text.samples import Samples


def memory_needed(
    config: Qwen3Config,
    samples: Samples | None,
    original: bool = False,
    token_floor: int = 0,
    fisher_samples: int = 0,
    outer: bool = False,
    without_torch: bool = False,
) -> int:
    """Estimated peak memory in bytes; see `solve.memory`."""
    return memory_parts(config, samples, original, token_floor, fisher_samples, outer, without_torch).peak


def check_memory(
    config: Qwen3Config,
    samples: Samples | None,
    original: bool,
    limit: int | None,
    workers: int = 0,
    token_floor: int = 0,
    fisher_samples: int = 0,
    outer: bool = False,
    without_torch: bool = False,
) -> int:
    """Raise InputError when the run needs more than `--memory`.

    Gives what a process needs that solves blocks, in bytes: this one, or each of `workers` on this machine, which count
    together with this one.
    """
    parts = memory_parts(config, samples, original, token_floor, fisher_samples, outer, without_torch)
    needed = parts.peak + ((workers - 1) * parts.peak + parts.without_blocks if workers else 0)
    if limit is not None and needed > limit:
        each = f" ({workers} workers with {binary_size(parts.peak)} each, and the command itself)" if workers else ""
        raise InputError(
            f"this run needs about {binary_size(needed)} of memory{each}, --memory allows {binary_size(limit)}",
            "allow more"
            + (", or give fewer workers" if workers > 1 else "")
            + "; one block and the work on its largest linear must fit",
        )
    return parts.peak


def check_peak_memory(limit: int | None) -> None:
    """Raise ResourceError when the process has taken more than `--memory`: the estimate was wrong."""
    if limit is not None and (peak := peak_rss_bytes()) > limit:
        raise ResourceError(
            f"the run has taken {binary_size(peak)} of memory, --memory allows {binary_size(limit)}",
            "finished blocks are kept: the same command with more --memory, or without it, goes on",
        )


def artifact_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Estimated bytes of the quantized folder."""
    config = checkpoint.config
    total = sum(entry.end - entry.begin for entry in checkpoint.stored_entries())
    total += sum(path.stat().st_size for path in checkpoint.sidecars())
    for name, shape in config.all_matrices().items():
        if scheme := recipe.scheme_for(name):
            entry = checkpoint.entry(f"{name}.weight")
            total += int(math.prod(shape) * scheme.bits_per_weight(shape) / 8) - (entry.end - entry.begin)
    return total


def activation_bytes(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, original: bool = False, fisher_samples: int = 0
) -> int:
    """Estimated bytes of both models' activations at their fullest.

    They lie in OUTPUT.partial or in `--scratch`.
    """
    config, total = checkpoint.config, 0
    if samples is not None:
        # The original runs on every so many samples. A fold is searched on some, whose files lie beside the others.
        options = load_method(recipe)[1]
        beside = 1 / getattr(options, "shift_every", 1) if original else 0
        passes = 1 + beside + (1 / FOLD_EVERY if fold_of(options) != "none" else 0)
        total += int(state_bytes(config, samples.tokens, _input_bytes()) * passes)
        if original and config.sparse_layers:
            # What experts leave of the original's residual stream.
            total += 4 * samples.tokens * config.hidden_size
        if fisher_samples:
            tokens = min(fisher_samples, len(samples.ids)) * len(samples.ids[0])
            rows = [n for layer in range(config.num_layers) for n in measured_rows(config, layer).values()]
            total += 4 * (
                sum(min(OUTPUT_PIECE, n) * n for n in rows) + tokens * config.hidden_size * (config.num_layers + 2)
            )
    return total


def state_bytes(config: Qwen3Config, tokens: int, input_bytes: int = 4) -> int:
    """Estimated bytes of one model's activations at their fullest.

    Hidden states before, inside and after a block, what a layer's experts add to it, and the inputs of its stages,
    which lie side by side. `input_bytes`: of one input.
    """
    inner = max(_kept_inputs(config, layer) for layer in range(config.num_layers))
    states = 4 if config.sparse_layers else 3
    return tokens * (4 * states * config.hidden_size + input_bytes * inner + 12 * config.experts_per_token)


def _input_bytes() -> int:
    """Bytes of one input of a linear in its file.

    2 where the processor multiplies in bf16.
    """
    from qwen3_export.model.workers import fast_matmul

    return 2 if fast_matmul() == "bf16" else 4


def _kept_inputs(config: Qwen3Config, layer: int) -> int:
    """Inputs per token that are kept beside the residual stream.

    They are those of the stages that read no norm.
    """
    stages = [stage for stage in config.block(layer).stages if stage.source]
    return sum(stage.in_features * (config.experts_per_token if stage.routed else 1) for stage in stages)


def check_disk(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples | None,
    original: bool,
    partial: Path,
    fisher_samples: int = 0,
    scratch: Path | None = None,
) -> None:
    """Raise ResourceError when a file system has too little room for the run.

    `scratch` is the folder of the activations where they have one of their own.
    """
    own = artifact_bytes(checkpoint, recipe)
    spilled = activation_bytes(checkpoint, recipe, samples, original, fisher_samples)
    hints = {partial: "free some room, or write --output to another disk"}
    if scratch is None:
        if spilled:
            hints[partial] += f"; {binary_size(spilled)} of it are activations, for which --scratch names another"
        check_room({partial: own + spilled}, hints)
        return
    hints[scratch] = "free some room, or give a --scratch on another disk"
    check_room({partial: own, scratch: spilled}, hints)
