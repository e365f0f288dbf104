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
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import dequantize
from qwen3_export.model.block import NUM_STAGES, Block, State
from qwen3_export.model.decoder import Rope, load_block, rope_tables, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import Group, Solved
from qwen3_export.solve.moments import Moments, Sample, collect
from qwen3_export.solve.states import RowFile, States
from qwen3_export.text import Rows

TOKENS_AT_ONCE = 4096
HELD_OUT = 8
QUANTIZED, ORIGINAL = "quantized", "original"


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

    def hidden_path(self, layer: int, stream: str = QUANTIZED) -> Path:
        """Where the rows' hidden states before block `layer` are kept, of one of the two models."""
        return self.scratch / f"{stream}-{layer:04d}.rows"

    @property
    def streams(self) -> tuple[str, ...]:
        """The models that run: the quantized one, and the original beside it if the method asks."""
        return (QUANTIZED, ORIGINAL) if self.method.needs_original(self.options) else (QUANTIZED,)

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
    for stream in job.streams:
        file = job.hidden_file(job.scratch / "embedding.rows")
        for row, ids in enumerate(job.rows.ids):
            file.write(row, to_torch(table[ids]).float()[None])
        file.keep_as(job.hidden_path(0, stream))
        file.close()


def forget_hidden(job: Job, layer: int) -> None:
    """Delete the hidden states before a block that is done."""
    for stream in job.streams:
        job.hidden_path(layer, stream).unlink(missing_ok=True)


@dataclass(frozen=True)
class Walk:
    """One model's block and the state of all rows in it."""

    stream: str
    block: Block
    states: States


def solve_block(job: Job, layer: int) -> dict[str, SolvedLinear]:
    """Quantize one block; with inputs, leave the hidden states after it in `hidden_path(layer + 1)`."""
    block = load_block(job.checkpoint, layer, job.device)
    if not job.method.NEEDS_INPUTS:
        names = [name for stage in range(NUM_STAGES) for name in block.stage_linears(stage)]
        return _solve_linears(job, block, names, None)
    assert job.rows is not None
    rope = rope_tables(job.checkpoint.config, 0, len(job.rows.ids[0]), job.device)
    walks = [_enter(job, block, stream) for stream in job.streams]
    try:
        results: dict[str, SolvedLinear] = {}
        for stage in range(NUM_STAGES):
            results.update(_solve_stage(job, stage, walks))
            for walk in walks:
                walk.states.advance(partial(_advance, job, walk.block, stage, rope), job.pool)
        for walk in walks:
            # Closed at once: a file that is deleted while it is open keeps its room on the disk.
            with closing(walk.states.take("residual")) as hidden:
                hidden.keep_as(job.hidden_path(layer + 1, walk.stream))
    finally:
        for walk in walks:
            walk.states.close()
    return results


def _enter(job: Job, block: Block, stream: str) -> Walk:
    """All rows at the entrance of the block; the original's weights are never replaced."""
    assert job.rows is not None
    own = Block(block.config, block.layer, dict(block.weights))
    folder = job.scratch / f"{stream}-states"
    folder.mkdir(exist_ok=True)
    states = States(folder, len(job.rows.ids))
    before = job.hidden_file(job.hidden_path(block.layer, stream))
    try:
        states.advance(lambda row, _: own.enter(before.read(row).to(job.device)), job.pool)
    finally:
        before.close()
    return Walk(stream, own, states)


def _advance(job: Job, block: Block, stage: int, rope: Rope, _row: int, state: State) -> State:
    moved = {name: tensor.to(job.device) for name, tensor in state.items()}
    after = block.advance(stage, moved, rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def _solve_stage(job: Job, stage: int, walks: list[Walk]) -> dict[str, SolvedLinear]:
    results: dict[str, SolvedLinear] = {}
    block = walks[0].block
    for names in _groups(block.stage_linears(stage)):
        wanted = [name for name in names if job.recipe.scheme_for(f"{block_name(block.layer)}.{name}")]
        if wanted:
            results.update(_solve_linears(job, block, wanted, _moments(job, wanted[0], walks)))
    return results


def _groups(names: list[str]) -> Iterator[list[str]]:
    """Linears that share one input: all of a dense stage, or those of one expert."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    yield from ([name for name in names if name.rpartition(".")[0] == owner] for owner in owners)


def _solve_linears(
    job: Job, block: Block, names: list[str], moments: tuple[Moments, Moments] | None
) -> dict[str, SolvedLinear]:
    """Solve some linears of a block and put what will be shipped in their place."""
    prefix = block_name(block.layer)
    schemes = {f"{prefix}.{name}": job.recipe.scheme_for(f"{prefix}.{name}") for name in names}
    chosen = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    weights = {name: block.weights[name.removeprefix(f"{prefix}.")] for name in chosen}
    group = Group(weights, chosen)
    if moments is not None:
        joined = moments[0].join(moments[1])
        known = joined.drift is not None
        group = Group(weights, chosen, joined.hessian, joined.tokens, *(moments if known else (None, None)))
    solved = job.method.solve(group, job.options, job.pool)
    if moments is not None:
        for name, result in solved.items():
            shipped = torch.from_numpy(dequantize(result.tensor)).to(job.device)
            block.weights[name.removeprefix(f"{prefix}.")] = shipped
    return {name: SolvedLinear(result, group.tokens) for name, result in solved.items()}


def _moments(job: Job, name: str, walks: list[Walk]) -> tuple[Moments, Moments]:
    """Moments of one linear's inputs over most rows, and over every eighth, which is held out."""
    assert job.rows is not None
    rows, size = range(len(job.rows.ids)), walks[0].block.weights[name].shape[1]
    at_once = max(1, TOKENS_AT_ONCE // len(job.rows.ids[0]))

    def over(chosen: list[int]) -> Moments:
        return collect(partial(_sample, name, walks, job.device), chosen, at_once, size, job.device, job.pool)

    held_out = [row for row in rows if row % HELD_OUT == HELD_OUT - 1]
    return over([row for row in rows if row not in held_out]), over(held_out)


def _sample(name: str, walks: list[Walk], device: str, row: int) -> Sample:
    """One row's inputs of a linear; with the original beside, how far they are from it."""
    block, state = walks[0].block, walks[0].states.read(row)
    x = block.inputs_of(name, state).to(device)
    if len(walks) == 1 or ".experts." in name:
        return Sample(x)
    original = walks[1].states.read(row)
    drift = walks[1].block.inputs_of(name, original).to(device) - x
    if not name.endswith(("o_proj", "down_proj")):
        return Sample(x, drift)
    gap = (original["residual"] - state["residual"]).to(device)
    return Sample(x, drift, gap.reshape(-1, gap.shape[-1]))
