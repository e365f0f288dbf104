"""An estimate of a recipe's time on this machine, from trials on random numbers.

The recipe runs on one block with few and with more samples, which gives two numbers:

    seconds of the trial's block = at rest + per token · tokens

For the model's blocks, `at rest` is scaled with the work of solving, `per token` with the work of running. A block
wider than `_WIDEST` is narrowed for the trial. Embedding and head, if the recipe quantizes them, are timed on some of
their rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import to_json
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config, parse_config
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.text.samples import Samples

_WIDEST, _WIDEST_INNER, _EXPERTS, _VOCABULARY = 1024, 3072, 8, 2048
_LENGTH, _FEW, _MORE = 256, 4, 16
# Work on every weight that does not grow with the width, in columns that cost as much: candidates that are searched.
_SEARCHED = 1200
# Python, torch and compiled loops until they are ready, and without torch; bytes a second of reading, hashing and
# writing what stays.
_START_SECONDS, _PLAIN_START_SECONDS, _BYTES_PER_SECOND = 4.0, 0.7, 1e9


@dataclass(frozen=True)
class Work:
    """Work on one block, at rest and per token; only ratios matter."""

    at_rest: float
    per_token: float


def work_of(config: Qwen3Config, layer: int, with_inputs: bool) -> Work:
    """Multiplications for solving a block, and for running one token through it.

    The sums of its moments are included.
    """
    shapes = config.linear_shapes(layer)
    at_rest = sum(out_rows * width * (_SEARCHED + width if with_inputs else 1) for out_rows, width in shapes.values())
    share = config.experts_per_token / config.num_experts if config.is_sparse(layer) else 1.0
    firsts = {group[0] for stage in config.block(layer).stages for group in stage.groups}
    per_token = 0.0
    for name, (out_rows, width) in shapes.items():
        active = share if is_expert(name) else 1.0
        # Linears that read one input share their moments.
        moments = width * width if with_inputs and name in firsts else 0
        per_token += active * (2 * out_rows * width + moments)
    return Work(at_rest, per_token)


def narrowed(raw: Mapping[str, Any], config: Qwen3Config) -> dict[str, Any]:
    """The `config.json` of a small model with one block of the same kind."""
    heads = max(1, min(config.num_heads, _WIDEST // config.head_dim))
    kv_heads = max(1, heads * config.num_kv_heads // config.num_heads)
    while heads % kv_heads:
        kv_heads -= 1
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "vocab_size": min(config.vocab_size, _VOCABULARY),
        "hidden_size": min(config.hidden_size, _WIDEST),
        "intermediate_size": min(config.intermediate_size, _WIDEST_INNER),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.head_dim,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    if config.sparse_layers:
        experts = min(config.num_experts, _EXPERTS)
        spelled = "num_local_experts" if raw.get("num_local_experts") is not None else "num_experts"
        changes[spelled] = experts
        # As large a share of them as in the model.
        changes["num_experts_per_tok"] = max(1, round(config.experts_per_token * experts / config.num_experts))
    return {**raw, **changes}


def estimate_seconds(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples | None,
    settings: QuantizeSettings,
    progress: Progress,
    nodes: int = 1,
) -> float:
    """Seconds that `quantize` would take here, from trials of a few seconds.

    Of several `nodes` like this one each does an equal part of the blocks, which is the best case.
    """
    from qwen3_export.solve.setup import runs_without_torch

    config, outer = checkpoint.config, {EMBEDDING, HEAD} & {rule.match for rule in recipe.rules if rule.scheme}
    inner = replace(recipe, rules=tuple(rule for rule in recipe.rules if rule.match not in (EMBEDDING, HEAD)))
    with tempfile.TemporaryDirectory(prefix="qwen3-export-plan-") as name, progress.bar("time a block", 4) as tick:
        folder = Path(name)
        small = _write_block(folder / "block", narrowed(checkpoint.raw_config, config))
        few, more = (_random_samples(small, count) if samples else None for count in (_FEW, _MORE))
        of_few, of_more = (_as_starved(inner, checkpoint, samples, small, trial) for trial in (few, more))
        _trial(small, of_few, few, settings, folder / "warm")
        tick()
        at_few = _trial(small, of_few, few, settings, folder / "few")
        tick()
        per_token = 0.0
        if few is not None and more is not None:
            at_more = _trial(small, of_more, more, settings, folder / "more")
            per_token = max(0.0, (at_more - at_few) / (more.tokens - few.tokens))
        tick()
        for_outer = _trial(small, recipe, few, settings, folder / "outer") - at_few if outer else 0.0
        tick()
    at_rest = max(0.0, at_few - per_token * (few.tokens if few else 0))
    done = work_of(small.config, 0, samples is not None)
    total = max(0.0, for_outer) * config.vocab_size / small.config.vocab_size
    total += _PLAIN_START_SECONDS if runs_without_torch(checkpoint, recipe, settings) else _START_SECONDS
    total += sum(entry.end - entry.begin for entry in checkpoint.stored_entries()) / _BYTES_PER_SECOND
    for layer in range(config.num_layers):
        work = work_of(config, layer, samples is not None)
        block = at_rest * work.at_rest / done.at_rest
        block += per_token * (samples.tokens if samples else 0) * work.per_token / done.per_token
        total += block / nodes
    return total


def _as_starved(
    recipe: Recipe, checkpoint: Checkpoint, samples: Samples | None, small: Checkpoint, trial: Samples | None
) -> Recipe:
    """The recipe with a floor that the same share of the trial's experts misses.

    Experts below the floor are solved in another way, which takes another time.
    """
    config = checkpoint.config
    if samples is None or trial is None or not config.sparse_layers:
        return recipe
    each, own = (
        rows.tokens * c.experts_per_token / c.num_experts for rows, c in ((samples, config), (trial, small.config))
    )
    floor = recipe.experts.token_floor(config.expert_width)
    return replace(recipe, experts=replace(recipe.experts, min_tokens=round(floor * own / each)))


def _write_block(folder: Path, raw: dict[str, Any]) -> Checkpoint:
    """A checkpoint of one block of random numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(raw))
    config, random = parse_config(raw, "trial"), np.random.default_rng(0)
    tensors = {
        name: (random.standard_normal(shape, np.float32) / math.sqrt(shape[-1])).astype(ml_dtypes.bfloat16)
        for name, shape in config.tensor_shapes().items()
    }
    write_tensors(folder / "model.safetensors", tensors.items())
    return open_checkpoint(folder)


def _random_samples(checkpoint: Checkpoint, count: int) -> Samples:
    length = min(_LENGTH, checkpoint.config.max_position)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (count, length), dtype=np.int32)
    return Samples(tuple(ids), ("trial",) * count)


def _trial(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, settings: QuantizeSettings, folder: Path
) -> float:
    """Seconds of the block loop."""
    from qwen3_export.solve.loop import run_blocks
    from qwen3_export.solve.output_folder import QuantizedFolder
    from qwen3_export.solve.setup import has_head_apart, new_job, open_pool, runs_without_torch

    folder.mkdir()
    layout, head_apart = settings.layout or recipe.layout, has_head_apart(checkpoint, recipe)
    target = QuantizedFolder(folder, checkpoint, layout, {}, head_apart)
    with open_pool(settings, runs_without_torch(checkpoint, recipe, settings)) as pool:
        job = new_job(checkpoint, recipe, samples, settings, pool, target.scratch)
        started = time.perf_counter()
        run_blocks(job, target, replace(settings, memory=None), Progress())
        return time.perf_counter() - started
