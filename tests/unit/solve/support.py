"""Helpers that several tests of the solve share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qwen3_export.core.architecture import ROUTER, Stage
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name
from qwen3_export.model import block as block_module
from qwen3_export.model.decoder import load_block, rope_tables, to_torch
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods import gptq
from tests.conftest import tiny_config, tiny_moe_config

CONFIGS = {
    "dense": tiny_config(vocab_size=8192),
    "moe": tiny_moe_config(vocab_size=8192, num_experts=4, mlp_only_layers=[1], norm_topk_prob=False),
}


def write_calibration_text(path: Path) -> Path:
    """Write a text long enough for the samples of these tests."""
    path.write_text(" ".join(f"{i} times {i} is {i * i}, and the {i}th row ends." for i in range(400)))
    return path


def hashes(folder: Path) -> dict[str, str]:
    assert not folder.with_name(f"{folder.name}.partial").exists()
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


class Interrupted(Progress):
    """Progress that interrupts the run, like Ctrl-C, after `blocks` blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        def tick() -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        yield tick


def spied(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> dict[str, LinearGroup]:
    """The groups of linears that GPTQ gets during `run`, by module name."""
    groups: dict[str, LinearGroup] = {}
    plain = gptq.solve

    def spy(group: LinearGroup, options: Any, pool: Any) -> Any:
        groups.update(dict.fromkeys(group.weights, group))
        return plain(group, options, pool)

    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", spy)
        run()
    return groups


def inputs_of_linears(folder: Path, rows: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Inputs `[n, in]` of a quantized model's linears and routers, in fp32."""
    checkpoint, seen = open_checkpoint(folder), defaultdict(list)

    def spy(block: block_module.Block, name: str, x: torch.Tensor) -> torch.Tensor:
        seen[f"{block_name(block.layer)}.{name}"].append(x.reshape(-1, x.shape[-1]))
        rounded = block.rounders[name](x) if name in block.rounders else x
        return F.linear(rounded, block.weights[name])

    plain = block_module.Block._route

    def route(block: block_module.Block, stage: Stage, state: block_module.State) -> block_module.State:
        if block.config.is_sparse(block.layer):
            seen[f"{block_name(block.layer)}.{ROUTER}"].append(state["x"].reshape(-1, state["x"].shape[-1]))
        return plain(block, stage, state)

    monkeypatch.setattr(block_module.Block, "linear", spy)
    monkeypatch.setattr(block_module.Block, "_route", route)
    embedding = to_torch(checkpoint.read("model.embed_tokens.weight")).float()
    rope, states = (
        rope_tables(checkpoint.config, 0, len(rows[0])),
        [embedding[torch.from_numpy(ids)][None] for ids in rows],
    )
    for layer in range(checkpoint.config.num_layers):
        block = load_block(checkpoint, layer)
        states = [block.forward(state, rope) for state in states]
    monkeypatch.undo()
    return {name: torch.cat(parts) for name, parts in seen.items()}
