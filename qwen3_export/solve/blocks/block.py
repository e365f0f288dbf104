"""The block loop: one decoder block in memory, samples handed on between blocks.

    for each block:                         for each stage (q,k,v │ o │ gate,up │ down):
        read its tensors                        H = mean x xᵀ over all samples
        fold scales, if asked                   solve the stage's linears against H
        enter all samples                       replace them by what was shipped
        solve its four stages       ──▶         advance all samples through them
        write its shard
        keep the samples' hidden states

Each shard and the hidden states after it are on disk before the block counts as done: a killed run
starts again at the first block that is not. Pieces of work are cut by constants, never by the
number of threads or the memory, so the bytes depend on neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.architecture import Stage, is_expert
from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.block import Block
from qwen3_export.model.decoder import load_block, put_quantized, rope_tables
from qwen3_export.model.table import Table, to_torch
from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.blocks.fold import apply_folds, choose_folds
from qwen3_export.solve.blocks.forward import BlockRun, RunSettings, layer_inputs, run_stage, start_run
from qwen3_export.solve.blocks.paired import add_missing_output, linear_inputs
from qwen3_export.solve.calibration.activations import SampleFile, write_embeddings
from qwen3_export.solve.calibration.experts import LayerInputs, LinearInputs
from qwen3_export.solve.calibration.measured_outputs import OF_EXPERTS
from qwen3_export.solve.calibration.moments import Moments
from qwen3_export.solve.chunk_sizes import FOLD_EVERY
from qwen3_export.solve.job import QUANTIZED, Job, SolvedBlock, SolvedLinear
from qwen3_export.solve.linear_parts import linears_from, parts_of
from qwen3_export.solve.memory import experts_at_once
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.rounding.nearest import round_group


def embed_samples(job: Job, quantized: QuantizedTensor | None = None) -> None:
    """Write the embeddings of all samples, the hidden states before block 0.

    `quantized` is what will be shipped.
    """
    assert job.samples is not None
    for model in job.models:
        shipped = quantized if model == QUANTIZED else None
        table = Table(job.checkpoint.read(f"{EMBEDDING}.weight") if shipped is None else shipped)
        file = job.hidden_file(job.scratch / "embedding.samples")
        write_embeddings(file, table, [job.samples.ids[sample] for sample in job.samples_of(model)])
        file.keep_as(job.hidden_path(0, model))
        file.close()


def drop_hidden(job: Job, layer: int) -> None:
    """The hidden states before a block that is done are no longer needed."""
    for model in job.models:
        path = job.hidden_path(layer, model)
        if job.spare_files is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            job.spare_files.put(path)


def solve_block(job: Job, layer: int) -> SolvedBlock:
    """Quantize one block.

    With inputs, leave the hidden states after it in `hidden_path(layer + 1)`.
    """
    config = job.checkpoint.config
    experts = config.num_experts if config.is_sparse(layer) else 0
    if job.samples is None:
        return SolvedBlock(_solve_alone(job, layer), {}, [0] * experts)
    block = load_block(job.checkpoint, layer, job.device, streamed=job.device == "cpu")
    rope = rope_tables(config, 0, len(job.samples.ids[0]), job.device)
    settings = RunSettings(
        job.pool,
        rope,
        job.samples_at_once,
        job.device,
        job.needs_magnitudes,
        job.int_matmul,
        job.spare_files,
        durable=True,
    )
    block.matmul_dtype, block.int_matmul = job.matmul_dtype, job.int_matmul
    replaced = _fold(job, block, settings) if job.fold != "none" else {}
    # The original's weights are never replaced.
    runs = [_start(job, settings, block if m == QUANTIZED else block.running(job.matmul_dtype), m) for m in job.models]
    try:
        results, counts = _solve_stages(job, runs)
        for run, model in zip(runs, job.models, strict=True):
            # Closed at once: a file that is deleted while it is open keeps its room on the disk.
            with closing(run.states.take("residual")) as hidden:
                _keep(hidden, job.hidden_path(layer + 1, model), job.pool)
    finally:
        for run in runs:
            run.states.close()
    return SolvedBlock(results, replaced, counts)


def _keep(hidden: SampleFile, path: Path, pool: Workers) -> None:
    """Give hidden states their lasting name: once, where workers share a block."""

    def rename(_: Sequence[Path]) -> None:
        if not (pool.is_shared and path.exists()):
            hidden.keep_as(path)

    pool.share("keep", [path], rename, lambda _: {}, lambda *_: None)


def _start(job: Job, settings: RunSettings, block: Block, model: str, chosen: Sequence[int] | None = None) -> BlockRun:
    """A run of one model's samples, or some of them, before the block."""
    before = job.hidden_file(job.hidden_path(block.layer, model))
    folder = job.states_folder(model, "" if chosen is None else "fold")
    return start_run(settings, block, before, folder, len(job.samples_of(model)), chosen)


def _solve_stages(job: Job, runs: list[BlockRun]) -> tuple[dict[str, SolvedLinear], list[int]]:
    """Solve stage after stage; returns the linears, and how many tokens reached each expert."""
    results: dict[str, SolvedLinear] = {}
    counts: list[int] = []
    for number, stage in enumerate(runs[0].block.stages):
        if stage.routed and not counts:
            counts = runs[0].routing.counts
        # Where a linear writes to the residual stream, what it should leave there is the original's.
        ahead = runs[1:] if stage.writes_residual else []
        for run in ahead:
            run_stage(run, number)
        if ahead and stage.routed:
            add_missing_output(job, runs, number)
        results.update(_solve_stage(job, stage, runs))
        for run in runs[:1] if ahead else runs:
            run_stage(run, number)
    return results, counts


def _fold(job: Job, block: Block, settings: RunSettings) -> dict[str, NDArray]:
    """Run some samples through the block, choose all scales, then move them."""
    assert job.samples is not None
    prefix, chosen, schemes = block_name(block.layer), [], job.schemes(block.layer)
    some = range(0, len(job.samples.ids), FOLD_EVERY)
    run = _start(job, settings, block.running(job.matmul_dtype), QUANTIZED, some)
    try:
        for stage in range(len(block.stages)):
            if stage > 0:
                run_stage(run, stage - 1)
            layer = layer_inputs(run, -(-job.token_floor // FOLD_EVERY), job.recipe.experts.fallback)

            def moments_of(name: str, layer: LayerInputs = layer) -> Moments | None:
                inputs = layer.inputs(name)
                return inputs.moments if inputs.fallback != "rtn" else None

            chosen += choose_folds(job.fold, block, stage, schemes, moments_of, job.pool)
    finally:
        run.states.close()
    replaced = apply_folds(block, chosen, lambda name: job.checkpoint.entry(f"{prefix}.{name}").dtype)
    return {f"{prefix}.{name}": array for name, array in replaced.items()}


def _solve_stage(job: Job, stage: Stage, runs: list[BlockRun]) -> dict[str, SolvedLinear]:
    results: dict[str, SolvedLinear] = {}
    block, schemes = runs[0].block, job.schemes(runs[0].block.layer)
    layer = layer_inputs(runs[0], job.token_floor, job.recipe.experts.fallback)
    groups = [wanted for names in stage.groups if (wanted := [name for name in names if name in schemes])]

    def solve_one(place: int) -> None:
        inputs = linear_inputs(job, groups[place][0], runs, layer)
        results.update(_solve_linears(job, block, groups[place], inputs))

    def solve(some: Sequence[int]) -> None:
        threads = job.pool.threads.count
        at_once = experts_at_once(job.checkpoint.config, len(runs) > 1, threads) if stage.routed else 1
        job.pool.map_apart(solve_one, some, at_once)

    def load(place: int, parts: Parts) -> None:
        found = linears_from(parts)
        _put(job, block, found)
        results.update(found)

    def dump(place: int) -> Parts:
        return parts_of({name: results[name] for n in groups[place] if (name := f"{block_name(block.layer)}.{n}")})

    # Experts are solved side by side, anything else in pieces: the work below is shared itself.
    if stage.routed:
        layer.prepare(stage, runs[0].routing.counts)
        job.pool.share("experts", range(len(groups)), solve, dump, load)
    else:
        solve(range(len(groups)))
    for name in stage.names:
        if name not in schemes:
            block.weights[name] = block.weights[name].to(job.matmul_dtype)
    ordered = (f"{block_name(block.layer)}.{name}" for group in groups for name in group)
    return {name: results[name] for name in ordered}


def _solve_alone(job: Job, layer: int) -> dict[str, SolvedLinear]:
    """Solve a block's linears without inputs, as they are stored.

    Two groups are in memory: one is read, and the last one's chunks are joined, while all threads are busy.
    """
    prefix, schemes = block_name(layer), job.schemes(layer)
    groups = [
        {f"{prefix}.{name}": schemes[name] for name in names if name in schemes}
        for stage in job.checkpoint.config.block(layer).stages
        for names in stage.groups
    ]

    def solve(group: dict[str, QuantScheme]) -> dict[str, SolvedLinear]:
        weights = {name: to_torch(job.checkpoint.read(f"{name}.weight")).to(job.device) for name in group}
        solved = job.method.solve(LinearGroup(weights, group), job.options, job.pool)
        return {name: SolvedLinear(result, 0) for name, result in solved.items()}

    with ThreadPoolExecutor(2) as pair:
        return {name: linear for solved in pair.map(solve, groups) for name, linear in solved.items()}


def _solve_linears(job: Job, block: Block, names: list[str], inputs: LinearInputs) -> dict[str, SolvedLinear]:
    """Solve some linears and put what will be shipped in their place."""
    prefix, local = block_name(block.layer), job.schemes(block.layer)
    chosen = {f"{prefix}.{name}": local[name] for name in names if name in local}
    if not chosen:
        return {}
    weights = {name: block.weights[name.removeprefix(f"{prefix}.")] for name in chosen}
    moments = inputs.moments
    peak = 0.0 if moments.peak is None else float(moments.peak.max())
    group = LinearGroup(
        weights, chosen, moments.hessian, inputs.tokens, inputs.paired, peak, _outputs(job, block, weights)
    )
    if inputs.fallback == "rtn":
        solved = round_group(replace(group, hessian=None), "mse", job.pool)
    else:
        solved = job.method.solve(group, job.options, job.pool)
    found = {name: SolvedLinear(result, inputs.tokens, inputs.fallback) for name, result in solved.items()}
    _put(job, block, found)
    return found


def _put(job: Job, block: Block, linears: Mapping[str, SolvedLinear]) -> None:
    """Make a block compute as the quantized linears do."""
    prefix = f"{block_name(block.layer)}."
    for name, linear in linears.items():
        # In its place, so that freed weights do not leave holes in memory that the codes then break up.
        put_quantized(block, name.removeprefix(prefix), linear.solved.tensor, job.device, len(job.models) == 1)


def _outputs(job: Job, block: Block, weights: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Fisher information of the linears' outputs by module name, where it was measured."""
    if job.fisher is None:
        return {}
    prefix, found = f"{block_name(block.layer)}.", {}
    for name, weight in weights.items():
        local = name.removeprefix(prefix)
        # Experts that write to the residual stream share what is known of their sum.
        shared = is_expert(local) and block.stage_of(local).writes_residual
        found[name] = job.fisher.of(block.layer, OF_EXPERTS if shared else local, len(weight))
    return {name: pieces for name, pieces in found.items() if pieces is not None}
