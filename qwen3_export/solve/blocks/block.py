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

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.block import NUM_STAGES, Block
from qwen3_export.model.decoder import Rope, load_block, put_quantized, rope_tables
from qwen3_export.model.table import Table, to_torch
from qwen3_export.solve.blocks.fold import apply_all, choose
from qwen3_export.solve.blocks.forward import WRITERS, Walk, enter, inputs_of, layer_of, move, note_missing
from qwen3_export.solve.calibration.experts import Inputs, Layer, count_tokens
from qwen3_export.solve.calibration.moments import Moments
from qwen3_export.solve.chunk_sizes import FOLD_EVERY
from qwen3_export.solve.job import QUANTIZED, Job, SolvedBlock, SolvedLinear
from qwen3_export.solve.method import Group
from qwen3_export.solve.rounding.nearest import round_group

# Where a sparse layer's tokens have been sent to their experts.
ROUTED = 2
# Where experts write to the residual stream.
MIXED = 3


def embed_rows(job: Job, quantized: QuantizedTensor | None = None) -> None:
    """Write the embeddings of all rows, the hidden states before block 0; `quantized` is what will be shipped."""
    assert job.rows is not None
    for stream in job.streams:
        shipped = quantized if stream == QUANTIZED else None
        table = Table(job.checkpoint.read(f"{EMBEDDING}.weight") if shipped is None else shipped)
        file = job.hidden_file(job.scratch / "embedding.rows")
        for place, row in enumerate(job.rows_of(stream)):
            file.write(place, table.rows(job.rows.ids[row])[None])
        file.keep_as(job.hidden_path(0, stream))
        file.close()


def forget_hidden(job: Job, layer: int) -> None:
    """The hidden states before a block that is done are no longer needed."""
    for stream in job.streams:
        path = job.hidden_path(layer, stream)
        if job.shelf is not None and path.exists():
            job.shelf.put(path)


def solve_block(job: Job, layer: int) -> SolvedBlock:
    """Quantize one block; with inputs, leave the hidden states after it in `hidden_path(layer + 1)`."""
    config = job.checkpoint.config
    experts = config.num_experts if config.is_sparse(layer) else 0
    if job.rows is None:
        return SolvedBlock(_solve_alone(job, layer), {}, [0] * experts)
    block = load_block(job.checkpoint, layer, job.device)
    rope = rope_tables(config, 0, len(job.rows.ids[0]), job.device)
    block.products, block.integers = job.products, job.integers
    replaced = _fold(job, block, rope) if job.fold != "none" else {}
    walks = [enter(job, block, stream) for stream in job.streams]
    try:
        results: dict[str, SolvedLinear] = {}
        counts: list[int] = []
        for stage in range(NUM_STAGES):
            if experts and stage == ROUTED:
                counts = count_tokens(walks[0].states, experts, job.pool)
            # Where a linear writes to the residual stream, what it should leave there is the original's.
            ahead = walks[1:] if stage in WRITERS else []
            for walk in ahead:
                move(job, walk, stage, rope)
            if ahead and experts and stage == MIXED:
                note_missing(job, walks, stage, rope)
            results.update(_solve_stage(job, stage, walks))
            for walk in walks[:1] if ahead else walks:
                move(job, walk, stage, rope)
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
    prefix, chosen, schemes = block_name(block.layer), [], job.schemes(block.layer)
    walk = enter(job, block.running(job.products), QUANTIZED, range(0, len(job.rows.ids), FOLD_EVERY))
    try:
        for stage in range(NUM_STAGES):
            if stage > 0:
                move(job, walk, stage - 1, rope)
            layer = layer_of(job, walk, -(-job.floor // FOLD_EVERY))

            def moments_of(name: str, layer: Layer = layer) -> Moments | None:
                inputs = layer.inputs(name)
                return inputs.moments if inputs.fallback != "rtn" else None

            chosen += choose(job.fold, block, stage, schemes, moments_of, job.pool)
    finally:
        walk.states.close()
    replaced = apply_all(block, chosen, lambda name: job.checkpoint.entry(f"{prefix}.{name}").dtype)
    return {f"{prefix}.{name}": array for name, array in replaced.items()}


def _solve_stage(job: Job, stage: int, walks: list[Walk]) -> dict[str, SolvedLinear]:
    results: dict[str, SolvedLinear] = {}
    block, schemes = walks[0].block, job.schemes(walks[0].block.layer)
    layer = layer_of(job, walks[0], job.floor)
    for names in _groups(block.stage_linears(stage)):
        wanted = [name for name in names if name in schemes]
        if wanted:
            inputs = inputs_of(job, wanted[0], walks, layer)
            results.update(_solve_linears(job, block, wanted, inputs))
    for name in block.stage_linears(stage):
        if name not in schemes:
            block.weights[name] = block.weights[name].to(job.products)
    return results


def _groups(names: list[str]) -> Iterator[list[str]]:
    """Linears that share one input: all of a dense stage, or those of one expert."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    yield from ([name for name in names if name.rpartition(".")[0] == owner] for owner in owners)


def _solve_alone(job: Job, layer: int) -> dict[str, SolvedLinear]:
    """Solve a block's linears without inputs, as they are stored: two groups in memory, so that one is read and the
    last one's pieces are joined while all threads are busy."""
    block, prefix = Block(job.checkpoint.config, layer, {}), block_name(layer)
    schemes = job.schemes(block.layer)
    groups = [
        {f"{prefix}.{name}": schemes[name] for name in names if name in schemes}
        for stage in range(NUM_STAGES)
        for names in _groups(block.stage_linears(stage))
    ]

    def solve(group: dict[str, QuantScheme]) -> dict[str, SolvedLinear]:
        weights = {name: to_torch(job.checkpoint.read(f"{name}.weight")).to(job.device) for name in group}
        solved = job.method.solve(Group(weights, group), job.options, job.pool)
        return {name: SolvedLinear(result, 0) for name, result in solved.items()}

    with ThreadPoolExecutor(2) as pair:
        return {name: linear for solved in pair.map(solve, groups) for name, linear in solved.items()}


def _solve_linears(job: Job, block: Block, names: list[str], inputs: Inputs) -> dict[str, SolvedLinear]:
    """Solve some linears of a block and put what will be shipped in their place."""
    prefix, local = block_name(block.layer), job.schemes(block.layer)
    chosen = {f"{prefix}.{name}": local[name] for name in names if name in local}
    if not chosen:
        return {}
    weights = {name: block.weights[name.removeprefix(f"{prefix}.")] for name in chosen}
    moments = inputs.moments
    peak = 0.0 if moments.peak is None else float(moments.peak.max())
    group = Group(weights, chosen, moments.hessian, inputs.tokens, inputs.compared, peak, _outputs(job, block, weights))
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
