"""The block loop: one decoder block in memory, calibration rows handed on from block to block.

    for each block:                         for each stage (q,k,v │ o │ gate,up │ down):
        read its tensors                        H = mean x xᵀ over all rows
        fold scales, if asked                   solve the stage's linears against H
        enter all rows                          replace them by what was shipped
        solve its four stages       ──▶         advance all rows through them
        write its shard
        keep the rows' hidden states

Each shard and the hidden states after it are on disk before the block counts as done: a killed run
starts again at the first block that is not. Pieces of work are cut by constants, never by the
number of threads or the memory, so the bytes depend on neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.block import NUM_STAGES, Block, State
from qwen3_export.model.decoder import Rope, load_block, put_quantized, rope_tables
from qwen3_export.model.table import Table, to_torch
from qwen3_export.solve.experts import Inputs, Layer, count_tokens
from qwen3_export.solve.fold import ROUTER, apply, search, sites, stored
from qwen3_export.solve.job import QUANTIZED, Job, SolvedBlock, SolvedLinear
from qwen3_export.solve.method import Group
from qwen3_export.solve.methods.rtn import round_group
from qwen3_export.solve.moments import Moments, Sample, collect
from qwen3_export.solve.states import States

TOKENS_AT_ONCE = 4096
HELD_OUT = 8
# Where a sparse layer's tokens have been sent to their experts.
ROUTED = 2
# A fold is searched on every fourth row.
FOLD_EVERY = 4


def embed_rows(job: Job, quantized: QuantizedTensor | None = None) -> None:
    """Write the embeddings of all rows, the hidden states before block 0; `quantized` is what will be shipped."""
    assert job.rows is not None
    for stream in job.streams:
        shipped = quantized if stream == QUANTIZED else None
        table = Table(job.checkpoint.read(f"{EMBEDDING}.weight") if shipped is None else shipped)
        file = job.hidden_file(job.scratch / "embedding.rows")
        for row, ids in enumerate(job.rows.ids):
            file.write(row, table.rows(ids)[None])
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


def solve_block(job: Job, layer: int) -> SolvedBlock:
    """Quantize one block; with inputs, leave the hidden states after it in `hidden_path(layer + 1)`."""
    config = job.checkpoint.config
    experts = config.num_experts if config.is_sparse(layer) else 0
    if job.rows is None:
        return SolvedBlock(_solve_alone(job, layer), {}, [0] * experts)
    block = load_block(job.checkpoint, layer, job.device)
    rope = rope_tables(config, 0, len(job.rows.ids[0]), job.device)
    replaced = _fold(job, block, rope) if job.fold != "none" else {}
    walks = [_enter(job, block, stream) for stream in job.streams]
    try:
        results: dict[str, SolvedLinear] = {}
        counts: list[int] = []
        for stage in range(NUM_STAGES):
            if experts and stage == ROUTED:
                counts = count_tokens(walks[0].states, experts, job.pool)
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
    return SolvedBlock(results, replaced, counts)


def _fold(job: Job, block: Block, rope: Rope) -> dict[str, NDArray]:
    """Walk some rows through the block as it is, choose the scales of every site, then move them all."""
    assert job.rows is not None
    prefix, chosen, schemes = block_name(block.layer), [], job.schemes(block)
    walk = _enter(job, block, QUANTIZED, range(0, len(job.rows.ids), FOLD_EVERY))
    try:
        for stage in range(NUM_STAGES):
            layer = _layer(job, walk, -(-job.floor // FOLD_EVERY))
            for site in (site for site in sites(block) if site.stage == stage):
                # The last target is the router where there is one: its input is that of all experts.
                inputs = layer.inputs(site.targets[-1])
                if inputs.fallback != "rtn":
                    scales = search(job.fold, site, block, inputs.moments, schemes, job.pool)
                    chosen += [(site, scales)] if scales is not None else []
            walk.states.advance(partial(_advance, job, walk.block, stage, rope), job.pool)
    finally:
        walk.states.close()
    replaced: dict[str, NDArray] = {}
    for site, scales in chosen:
        name = f"{prefix}.{site.source}.weight"
        changed = apply(block, site, scales, job.checkpoint.entry(name).dtype)
        if changed is not None:
            replaced[name] = changed
        if ROUTER in site.targets:
            router = f"{prefix}.{ROUTER}.weight"
            replaced[router] = stored(block.weights[ROUTER], job.checkpoint.entry(router).dtype)
    return replaced


def _enter(job: Job, block: Block, stream: str, rows: Sequence[int] | None = None) -> Walk:
    """All rows, or some, at the entrance of the block; the original's weights are never replaced."""
    assert job.rows is not None
    chosen = range(len(job.rows.ids)) if rows is None else rows
    own = block if stream == QUANTIZED else Block(block.config, block.layer, dict(block.weights))
    folder = job.scratch / f"{stream}-states"
    folder.mkdir(exist_ok=True)
    states = States(folder, len(chosen))
    before = job.hidden_file(job.hidden_path(block.layer, stream))
    try:
        states.advance(lambda row, _: own.enter(before.read(chosen[row]).to(job.device)), job.pool)
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
    block, schemes = walks[0].block, job.schemes(walks[0].block)
    layer = _layer(job, walks[0], job.floor)
    for names in _groups(block.stage_linears(stage)):
        wanted = [name for name in names if name in schemes]
        if wanted:
            results.update(_solve_linears(job, block, wanted, _inputs(job, wanted[0], walks, layer)))
    return results


def _groups(names: list[str]) -> Iterator[list[str]]:
    """Linears that share one input: all of a dense stage, or those of one expert."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    yield from ([name for name in names if name.rpartition(".")[0] == owner] for owner in owners)


def _solve_alone(job: Job, layer: int) -> dict[str, SolvedLinear]:
    """Solve a block's linears without inputs, as they are stored: a group in memory, the next one on its way."""
    block, prefix = Block(job.checkpoint.config, layer, {}), block_name(layer)
    schemes, results = job.schemes(block), {}
    groups = [
        {f"{prefix}.{name}": schemes[name] for name in names if name in schemes}
        for stage in range(NUM_STAGES)
        for names in _groups(block.stage_linears(stage))
    ]

    def read(group: dict[str, QuantScheme]) -> dict[str, Tensor]:
        return {name: to_torch(job.checkpoint.read(f"{name}.weight")).to(job.device) for name in group}

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, groups[0])
        for group, following in zip(groups, [*groups[1:], {}], strict=True):
            weights, coming = coming.result(), reader.submit(read, following)
            solved = job.method.solve(Group(weights, group), job.options, job.pool)
            results.update({name: SolvedLinear(result, 0) for name, result in solved.items()})
    return results


def _solve_linears(job: Job, block: Block, names: list[str], inputs: Inputs) -> dict[str, SolvedLinear]:
    """Solve some linears of a block and put what will be shipped in their place."""
    prefix, local = block_name(block.layer), job.schemes(block)
    chosen = {f"{prefix}.{name}": local[name] for name in names if name in local}
    if not chosen:
        return {}
    weights = {name: block.weights[name.removeprefix(f"{prefix}.")] for name in chosen}
    moments, (fitted, held_out) = inputs.moments, inputs.parts or (None, None)
    peak = 0.0 if moments.peak is None else float(moments.peak.max())
    group = Group(
        weights, chosen, moments.hessian, inputs.tokens, fitted, held_out, peak, _outputs(job, block, weights)
    )
    if inputs.fallback == "rtn":
        solved = round_group(replace(group, hessian=None), "mse", job.pool)
    else:
        solved = job.method.solve(group, job.options, job.pool)
    for name, result in solved.items():
        # In its place, so that freed weights do not leave holes in memory that the codes then break up.
        put_quantized(block, name.removeprefix(f"{prefix}."), result.tensor, job.device, len(job.streams) == 1)
    return {name: SolvedLinear(result, inputs.tokens, inputs.fallback) for name, result in solved.items()}


def _outputs(job: Job, block: Block, weights: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """How much the answer depends on the linears' outputs, by module name, where it was measured."""
    if job.outputs is None:
        return {}
    prefix = f"{block_name(block.layer)}."
    found = {n: job.outputs.of(block.layer, n.removeprefix(prefix), len(weight)) for n, weight in weights.items()}
    return {name: pieces for name, pieces in found.items() if pieces is not None}


def _layer(job: Job, walk: Walk, floor: int) -> Layer:
    collect_all = partial(_collect, job, walks=[walk], rows=list(range(walk.states.rows)))
    return Layer(walk.block, walk.states, floor, job.recipe.experts.fallback, collect_all, job.pool, job.device)


def _inputs(job: Job, name: str, walks: list[Walk], layer: Layer) -> Inputs:
    """Moments of one linear's inputs, over most rows and over every eighth, which is held out; an
    expert's over all of them, with what stands in where they are too few."""
    if ".experts." in name:
        return layer.inputs(name)
    fitted, held_out = split_rows(walks[0].states.rows)
    parts = _collect(job, name, walks, fitted), _collect(job, name, walks, held_out)
    joined = parts[0].join(parts[1])
    return Inputs(joined, joined.tokens, parts if joined.drift is not None else None)


def split_rows(count: int) -> tuple[list[int], list[int]]:
    """The rows that are fitted, and every eighth, which is held out."""
    held_out = [row for row in range(count) if row % HELD_OUT == HELD_OUT - 1]
    return [row for row in range(count) if row not in held_out], held_out


def _collect(job: Job, name: str, walks: list[Walk], rows: list[int]) -> Moments:
    assert job.rows is not None
    at_once, size = max(1, TOKENS_AT_ONCE // len(job.rows.ids[0])), walks[0].block.weights[name].shape[1]
    return collect(partial(_sample, name, walks, job.device), rows, at_once, size, job.device, job.pool)


def _sample(name: str, walks: list[Walk], device: str, row: int) -> Sample:
    """One row's inputs of a linear; with the original beside, how far they are from it."""
    alone, block = len(walks) == 1, walks[0].block
    state = walks[0].states.read(row, ("x", "experts") if alone else None)
    x = block.inputs_of(name, state).to(device)
    if alone:
        return Sample(x)
    original = walks[1].states.read(row)
    drift = walks[1].block.inputs_of(name, original).to(device) - x
    if not name.endswith(("o_proj", "down_proj")):
        return Sample(x, drift)
    gap = (original["residual"] - state["residual"]).to(device)
    return Sample(x, drift, gap.reshape(-1, gap.shape[-1]))
