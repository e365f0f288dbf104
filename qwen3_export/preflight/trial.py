"""A trial of a recipe on one block of random numbers.

The block is of the model's kind, and narrowed where the model is wide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import to_json
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.text.samples import Samples

_WIDEST, _WIDEST_INNER, _WIDEST_EXPERT, _EXPERTS, _VOCABULARY = 2048, 4096, 768, 8, 2048
_LENGTH = 256


@dataclass(frozen=True)
class Trial:
    """A trial's block and its seconds, by kind of work and in total.

    `starved`: share of its experts that too few tokens reached.
    """

    config: Qwen3Config
    samples: Samples | None
    seconds: Mapping[str, float]
    total: float
    starved: float = 0.0


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
        changes["moe_intermediate_size"] = min(config.moe_intermediate_size, _WIDEST_EXPERT)
        experts = min(config.num_experts, _EXPERTS)
        spelled = "num_local_experts" if raw.get("num_local_experts") is not None else "num_experts"
        changes[spelled] = experts
        # As large a share of them as in the model.
        changes["num_experts_per_tok"] = max(1, round(config.experts_per_token * experts / config.num_experts))
    return {**raw, **changes}


def as_starved(
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


def write_block(folder: Path, raw: dict[str, Any]) -> Checkpoint:
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


def random_samples(checkpoint: Checkpoint, count: int) -> Samples:
    """Samples of random words."""
    length = min(_LENGTH, checkpoint.config.max_position)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (count, length), dtype=np.int32)
    return Samples(tuple(ids), ("trial",) * count)


def run_trial(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, settings: QuantizeSettings, folder: Path
) -> Trial:
    """Run the block loop on the trial's block, and time it."""
    from qwen3_export.solve.loop import run_blocks
    from qwen3_export.solve.output_folder import QuantizedFolder
    from qwen3_export.solve.setup import has_head_apart, new_job, open_pool, runs_without_torch

    folder.mkdir()
    layout, head_apart = settings.layout or recipe.layout, has_head_apart(checkpoint, recipe)
    target = QuantizedFolder(folder, checkpoint, layout, {}, head_apart)
    with open_pool(settings, runs_without_torch(checkpoint, recipe, settings)) as pool:
        job = new_job(checkpoint, recipe, samples, settings, pool, target.scratch)
        started = time.perf_counter()
        records, _ = run_blocks(job, target, replace(settings, memory=None), Progress())
        total = time.perf_counter() - started
    tokens = records["blocks"][0]["expert_tokens"]
    floor = recipe.experts.token_floor(checkpoint.config.expert_width) if tokens else 0
    starved = sum(count < floor for count in tokens) / max(1, len(tokens))
    return Trial(checkpoint.config, samples, dict(pool.seconds), total, starved)
