"""The block loop: one decoder block in memory, calibration rows handed on from block to block.

    for each block:                         for each stage (q,k,v │ o │ gate,up │ down):
        read its tensors                        H = mean x xᵀ over all rows
        enter all rows                          solve the stage's linears against H
        solve its four stages       ──▶         replace them by what was shipped
        write its shard                         advance all rows through them
        keep the rows' hidden states

Each shard and the hidden states after it are on disk before the block counts as done: a killed run
starts again at the first block that is not. Pieces of work are cut by constants, never by the
number of threads or the memory, so the bytes depend on neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import dequantize
from qwen3_export.model.block import NUM_STAGES, Block, State
from qwen3_export.model.decoder import Rope, load_block, rope_tables, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import Group, Solved
from qwen3_export.solve.states import RowFile, States
from qwen3_export.text import Rows

TOKENS_AT_ONCE = 4096
_HESSIAN_COLUMNS = 512


@dataclass(frozen=True)
class Job:
    """What the block loop needs to know."""

    checkpoint: Checkpoint
    recipe: Recipe
    method: ModuleType
    options: Any
    rows: Rows | None
    pool: Workers
    scratch: Path
    device: str = "cpu"

    def hidden_path(self, layer: int) -> Path:
        """Where the rows' hidden states before block `layer` are kept."""
        return self.scratch / f"hidden-{layer:04d}.rows"

    def hidden_file(self, path: Path) -> RowFile:
        """Hidden states `[1, tokens, hidden]` per row, fp32."""
        assert self.rows is not None
        return RowFile(path, (1, len(self.rows.ids[0]), self.checkpoint.config.hidden_size))


@dataclass(frozen=True)
class SolvedLinear:
    """One quantized linear with what the manifest says about it."""

    solved: Solved
    tokens: int


def embed_rows(job: Job) -> None:
    """Write the embeddings of all rows, the hidden states before block 0."""
    assert job.rows is not None
    table = job.checkpoint.read("model.embed_tokens.weight")
    file = job.hidden_file(job.scratch / "embedding.rows")
    for row, ids in enumerate(job.rows.ids):
        file.write(row, to_torch(table[ids]).float()[None])
    file.keep_as(job.hidden_path(0))
    file.close()


def solve_block(job: Job, layer: int) -> dict[str, SolvedLinear]:
    """Quantize one block; with inputs, leave the hidden states after it in `hidden_path(layer + 1)`."""
    block = load_block(job.checkpoint, layer, job.device)
    if not job.method.NEEDS_INPUTS:
        names = [name for stage in range(NUM_STAGES) for name in block.stage_linears(stage)]
        return _solve_linears(job, block, names, None, 0)
    assert job.rows is not None
    rope = rope_tables(job.checkpoint.config, 0, len(job.rows.ids[0]), job.device)
    before = job.hidden_file(job.hidden_path(layer))
    states = States(job.scratch, len(job.rows.ids))
    try:
        states.advance(lambda row, _: block.enter(before.read(row).to(job.device)), job.pool)
        results: dict[str, SolvedLinear] = {}
        for stage in range(NUM_STAGES):
            results.update(_solve_stage(job, block, stage, states))
            states.advance(partial(_advance, job, block, stage, rope), job.pool)
        states.take("residual").keep_as(job.hidden_path(layer + 1))
    finally:
        before.close()
        states.close()
    return results


def _advance(job: Job, block: Block, stage: int, rope: Rope, _row: int, state: State) -> State:
    moved = {name: tensor.to(job.device) for name, tensor in state.items()}
    after = block.advance(stage, moved, rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def _solve_stage(job: Job, block: Block, stage: int, states: States) -> dict[str, SolvedLinear]:
    results: dict[str, SolvedLinear] = {}
    for names in _groups(block.stage_linears(stage)):
        wanted = [name for name in names if job.recipe.scheme_for(f"{block_name(block.layer)}.{name}")]
        if not wanted:
            continue
        hessian, tokens = _hessian(job, block, wanted[0], states)
        results.update(_solve_linears(job, block, wanted, hessian, tokens))
    return results


def _groups(names: list[str]) -> Iterator[list[str]]:
    """Linears that share one input: all of a dense stage, or those of one expert."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    yield from ([name for name in names if name.rpartition(".")[0] == owner] for owner in owners)


def _solve_linears(
    job: Job, block: Block, names: list[str], hessian: Tensor | None, tokens: int
) -> dict[str, SolvedLinear]:
    """Solve some linears of a block and put what will be shipped in their place."""
    prefix = block_name(block.layer)
    schemes = {f"{prefix}.{name}": job.recipe.scheme_for(f"{prefix}.{name}") for name in names}
    chosen = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    weights = {name: block.weights[name.removeprefix(f"{prefix}.")] for name in chosen}
    solved = job.method.solve(Group(weights, chosen, hessian, tokens), job.options, job.pool)
    if hessian is not None:
        for name, result in solved.items():
            shipped = torch.from_numpy(dequantize(result.tensor)).to(job.device)
            block.weights[name.removeprefix(f"{prefix}.")] = shipped
    return {name: SolvedLinear(result, tokens) for name, result in solved.items()}


def _hessian(job: Job, block: Block, name: str, states: States) -> tuple[Tensor, int]:
    """Mean of x xᵀ `[in, in]` over all inputs of one linear, and their number.

    Column strips are summed side by side, each over the rows in their order; only the upper
    triangle is computed.
    """
    assert job.rows is not None
    size = block.weights[name].shape[1]
    total, tokens = torch.zeros(size, size, device=job.device), 0
    strips = [slice(i, min(i + _HESSIAN_COLUMNS, size)) for i in range(0, size, _HESSIAN_COLUMNS)]
    at_once = max(1, TOKENS_AT_ONCE // len(job.rows.ids[0]))
    for begin in range(0, states.rows, at_once):
        chunk = range(begin, min(begin + at_once, states.rows))
        x = torch.cat(job.pool.map(lambda row: block.inputs_of(name, states.read(row)).to(job.device), chunk))
        tokens += len(x)

        def strip(columns: slice, x: Tensor = x) -> None:
            total[: columns.stop, columns].addmm_(x[:, : columns.stop].T, x[:, columns])

        job.pool.map(strip, strips)
    upper = total.triu() / max(tokens, 1)
    return upper + upper.triu(1).T, tokens
