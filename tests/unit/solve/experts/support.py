"""A mixture of experts that few tokens reach, and recipes with a rule for such experts.

The source has one expert that no token ever reaches: with one expert per token, a router row that is
the mean of the others is never the largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen3_export.core.qwen3 import block_name, parse_config
from qwen3_export.core.recipe import Recipe
from tests.conftest import copy_tokenizer, random_tensors, tiny_moe_config, write_checkpoint

SAMPLES, LENGTH, EXPERTS, NEVER = 11, 48, 4, 2
# 528 tokens on three experts: at least one of them gets fewer.
FLOOR = 170


def recipe(method: str = "gptq", fallback: str = "share", token_floor: int | None = FLOOR, **more: Any) -> Recipe:
    scheme = {"num_bits": 4, "group_size": 16, **more.pop("scheme", {})}
    rules = more.pop("rules", [{"match": "*", "scheme": scheme}])
    rule = {"min_tokens": token_floor, "fallback": fallback}
    values = {"name": "test", "method": method, "rules": rules, "options": more, "experts": rule}
    return Recipe.from_dict(values, "test")


def make_source(folder: Path, reference_folder: Path, **changes: Any) -> Path:
    sizes = {"vocab_size": 8192, "num_experts": EXPERTS, "num_experts_per_tok": 1, **changes}
    config = tiny_moe_config(**sizes)
    tensors = random_tensors(parse_config(config, "test"))
    for layer in range(config["num_hidden_layers"]):
        router = tensors[f"{block_name(layer)}.mlp.gate.weight"]
        others = [row for row in range(len(router)) if row != NEVER]
        router[NEVER] = router[others].astype(np.float32).mean(0).astype(router.dtype)
    write_checkpoint(folder, config, tensors)
    copy_tokenizer(reference_folder, folder)
    return folder
