"""Calibration samples on their way through one block, and what they say about the inputs of its linears.

    start_run             hidden states before the block ─▶ state before stage 0
    add_missing_output    what experts as they are will leave of the original's residual stream ─▶ `missing`
    linear_inputs         moments of a linear's inputs at the present stage, with the original beside where it runs
    run_stage             all samples through the linears of a stage, to the inputs of the next

Where the original runs beside, every eighth of its rows is held out (`gptq.target_shift`). An expert is compared on
the tokens that reach it in the quantized model, wherever the original sends them: gate_proj and up_proj with
the original's inputs of these tokens, down_proj with its own answer and its share of `missing`

    y + mix / Σ mix² · missing      Σ over the token's experts

Were every expert to answer that, nothing would be missing, and no smaller change of answers does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3_export.model.block import NUM_STAGES, Block, State
from qwen3_export.model.decoder import Rope
from qwen3_export.solve.calibration.activations import BlockStates
from qwen3_export.solve.calibration.experts import LayerInputs, LinearInputs
from qwen3_export.solve.calibration.moments import (
    Moments,
    PairedMoments,
    SampleInputs,
    collect_moments,
    collect_moments_of_parts,
)
from qwen3_export.solve.job import ORIGINAL, QUANTIZED, Job

HELD_OUT = 8
# Stages whose linears write to the residual stream.
WRITERS = (1, 3)


@dataclass(frozen=True)
class BlockRun:
    """One model's block and the state of all rows in it."""

    model: str
    block: Block
    states: BlockStates


def start_run(job: Job, block: Block, model: str, rows: Sequence[int] | None = None) -> BlockRun:
    """All of a model's rows, or some, at the entrance of the block; the original's weights are never replaced."""
    assert job.samples is not None
    chosen = range(len(job.samples_of(model))) if rows is None else rows
    own = block if model == QUANTIZED else block.running(job.matmul_dtype)
    folder = job.scratch / f"{model}-states"
    folder.mkdir(exist_ok=True)
    before = job.hidden_file(job.hidden_path(block.layer, model))
    before.lasting = True
    # All rows in their order need no copy of their hidden states.
    states = BlockStates(folder, len(chosen), {"residual": before} if rows is None else {}, job.spare_files)

    def step(place: int, state: State) -> State:
        hidden = before.read(chosen[place]) if rows is not None else state["residual"]
        entered = own.initial_state(hidden.to(job.device))
        return {**entered, "residual": state.get("residual", hidden)}

    try:
        states.advance(step, job.pool)
    finally:
        if rows is not None:
            before.close()
    return BlockRun(model, own, states)


def run_stage(job: Job, run: BlockRun, stage: int, rope: Rope) -> None:
    """All rows through the linears of a stage; those between two writers leave the residual stream alone."""
    step = partial(_advance, job, run.block, stage, rope)
    lasting = ("residual",) if stage == NUM_STAGES - 1 else ()
    run.states.advance(step, job.pool, () if stage in WRITERS else ("residual",), lasting)


def _advance(job: Job, block: Block, stage: int, rope: Rope, _row: int, state: State) -> State:
    moved = {name: tensor.to(job.device) for name, tensor in state.items()}
    after = block.advance(stage, moved, rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def add_missing_output(job: Job, runs: list[BlockRun], stage: int, rope: Rope) -> None:
    """Add `missing` `[1, tokens, hidden]` to the quantized model's rows before its experts write to the residual
    stream: what the original, which is a stage ahead, has there and they will not; zeros where it does not run."""
    ours, theirs = runs
    beside = {row: place for place, row in enumerate(job.samples_of(ORIGINAL))}

    def step(row: int, state: State) -> State:
        if row not in beside:
            return {**state, "missing": torch.zeros_like(state["residual"])}
        found = _advance(job, ours.block, stage, rope, row, state)["residual"].cpu()
        wanted = theirs.states.read(beside[row], ("residual",))["residual"]
        return {**state, "missing": wanted - found}

    ours.states.advance(step, job.pool)


def layer_inputs(job: Job, run: BlockRun, token_floor: int) -> LayerInputs:
    """A block at one stage with all rows in it, for experts, and for folds."""
    collect_all = partial(_collect, job, runs=[run], rows=list(range(run.states.rows)))
    return LayerInputs(
        run.block, run.states, token_floor, job.recipe.experts.fallback, collect_all, job.pool, job.device
    )


def linear_inputs(job: Job, name: str, runs: list[BlockRun], layer: LayerInputs) -> LinearInputs:
    """Moments of one linear's inputs, over most rows and over every eighth, which is held out; for an expert that
    too few tokens reach, over all of them with what stands in."""
    expert = ".experts." in name
    if len(runs) > 1:
        samples = [partial(_sample, job, name, some) for some in (runs, runs[:1])]
        found = paired_inputs(job, samples, runs[0].block.width(name))
        return layer.inputs(name) if expert and found.tokens < job.token_floor else found
    if expert:
        return layer.inputs(name)
    moments = _collect(job, name, runs, list(range(runs[0].states.rows)))
    return LinearInputs(moments, moments.tokens)


def paired_inputs(job: Job, samples: Sequence[Callable[[int], SampleInputs]], size: int) -> LinearInputs:
    """Moments of the rows that ran through the original too, in two parts, joined by those of the others.

    `samples` are one row's inputs with the original beside, and alone; `size` is their number.
    """
    assert job.samples is not None
    beside, alone = samples
    fitted, held_out = split_held_out(job.samples_of(ORIGINAL))
    others = sorted({*job.samples_of(QUANTIZED)} - {*fitted, *held_out})
    parts = [(beside, fitted), (beside, held_out), *([(alone, others)] if others else [])]
    found = collect_moments_of_parts(
        parts, job.samples_at_once, size, job.device, job.pool, job.needs_magnitudes, job.int_matmul
    )
    both = found[0].join(found[1])
    joined = both.join(found[2]) if others else both
    return LinearInputs(joined, joined.tokens, PairedMoments(found[0], found[1], both))


def split_held_out(rows: list[int]) -> tuple[list[int], list[int]]:
    """The rows that are fitted, and every eighth, which is held out."""
    held_out = rows[HELD_OUT - 1 :: HELD_OUT]
    return [row for row in rows if row not in held_out], held_out


def _collect(job: Job, name: str, runs: list[BlockRun], rows: list[int]) -> Moments:
    sample = partial(_sample, job, name, runs)
    return collect_moments(
        sample,
        rows,
        job.samples_at_once,
        runs[0].block.width(name),
        job.device,
        job.pool,
        job.needs_magnitudes,
        job.int_matmul,
    )


def _sample(job: Job, name: str, runs: list[BlockRun], row: int) -> SampleInputs:
    """One row's inputs of a linear; with the original beside, how far they are from its, or what to answer."""
    alone, block, device = len(runs) == 1, runs[0].block, job.device
    expert, writes = ".experts." in name, name.endswith(("o_proj", "down_proj"))
    more = () if alone or not writes else ("mix", "missing") if expert else ("residual",)
    state = runs[0].states.read(row, ("x", "experts", *more))
    x = block.inputs_of(name, state).to(device)
    if alone:
        return SampleInputs(x)
    theirs, place = runs[1], job.samples_of(ORIGINAL).index(row)
    if writes:
        if expert:
            wanted = block.linear(name, x) + _share(name, state).to(device)
        else:
            wanted = theirs.states.read(place, ("residual",))["residual"] - state["residual"]
        return SampleInputs(x, target=wanted.reshape(-1, wanted.shape[-1]).to(device, x.dtype))
    # The same tokens of the original: an expert's by the quantized model's choice.
    beside = {**state, **theirs.states.read(place, ("x",))}
    original = theirs.block.inputs_of(name, beside).to(device)
    return SampleInputs(x, (original.float() - x.float()).to(x.dtype))


def _share(name: str, state: State) -> Tensor:
    """What one expert is to add to its answers `[n, hidden]`: see the module docstring."""
    chosen, mix = state["experts"] == int(name.split(".")[2]), state["mix"]
    token = chosen.any(-1)
    part = mix[chosen] / mix.square().sum(-1)[token]
    return state["missing"][token] * part[:, None]
