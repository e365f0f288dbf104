"""Calibration rows on their way through one block, and what they say about the inputs of its linears.

    enter         hidden states before the block ─▶ state before stage 0
    note_missing  what experts as they are will leave of the original's residual stream ─▶ `missing`
    inputs_of     moments of a linear's inputs at the present stage, with the original beside where it runs
    move          all rows through the linears of a stage, to the inputs of the next

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
from qwen3_export.solve.calibration.activations import States
from qwen3_export.solve.calibration.experts import Inputs, Layer
from qwen3_export.solve.calibration.moments import Compared, Moments, Sample, collect, collect_parts
from qwen3_export.solve.job import ORIGINAL, QUANTIZED, Job

HELD_OUT = 8
# Stages whose linears write to the residual stream.
WRITERS = (1, 3)


@dataclass(frozen=True)
class Walk:
    """One model's block and the state of all rows in it."""

    stream: str
    block: Block
    states: States


def enter(job: Job, block: Block, stream: str, rows: Sequence[int] | None = None) -> Walk:
    """All of a model's rows, or some, at the entrance of the block; the original's weights are never replaced."""
    assert job.rows is not None
    chosen = range(len(job.rows_of(stream))) if rows is None else rows
    own = block if stream == QUANTIZED else block.running(job.products)
    folder = job.scratch / f"{stream}-states"
    folder.mkdir(exist_ok=True)
    before = job.hidden_file(job.hidden_path(block.layer, stream))
    before.lasting = True
    # All rows in their order need no copy of their hidden states.
    states = States(folder, len(chosen), {"residual": before} if rows is None else {}, job.shelf)

    def step(place: int, state: State) -> State:
        hidden = before.read(chosen[place]) if rows is not None else state["residual"]
        entered = own.enter(hidden.to(job.device))
        return {**entered, "residual": state.get("residual", hidden)}

    try:
        states.advance(step, job.pool)
    finally:
        if rows is not None:
            before.close()
    return Walk(stream, own, states)


def move(job: Job, walk: Walk, stage: int, rope: Rope) -> None:
    """All rows through the linears of a stage; those between two writers leave the residual stream alone."""
    step = partial(_advance, job, walk.block, stage, rope)
    lasting = ("residual",) if stage == NUM_STAGES - 1 else ()
    walk.states.advance(step, job.pool, () if stage in WRITERS else ("residual",), lasting)


def _advance(job: Job, block: Block, stage: int, rope: Rope, _row: int, state: State) -> State:
    moved = {name: tensor.to(job.device) for name, tensor in state.items()}
    after = block.advance(stage, moved, rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def note_missing(job: Job, walks: list[Walk], stage: int, rope: Rope) -> None:
    """Add `missing` `[1, tokens, hidden]` to the quantized model's rows before its experts write to the residual
    stream: what the original, which is a stage ahead, has there and they will not; zeros where it does not run."""
    ours, theirs = walks
    beside = {row: place for place, row in enumerate(job.rows_of(ORIGINAL))}

    def step(row: int, state: State) -> State:
        if row not in beside:
            return {**state, "missing": torch.zeros_like(state["residual"])}
        found = _advance(job, ours.block, stage, rope, row, state)["residual"].cpu()
        wanted = theirs.states.read(beside[row], ("residual",))["residual"]
        return {**state, "missing": wanted - found}

    ours.states.advance(step, job.pool)


def layer_of(job: Job, walk: Walk, floor: int) -> Layer:
    """A block at one stage with all rows in it, for experts, and for folds."""
    collect_all = partial(_collect, job, walks=[walk], rows=list(range(walk.states.rows)))
    return Layer(walk.block, walk.states, floor, job.recipe.experts.fallback, collect_all, job.pool, job.device)


def inputs_of(job: Job, name: str, walks: list[Walk], layer: Layer) -> Inputs:
    """Moments of one linear's inputs, over most rows and over every eighth, which is held out; for an expert that
    too few tokens reach, over all of them with what stands in."""
    expert = ".experts." in name
    if len(walks) > 1:
        samples = [partial(_sample, job, name, some) for some in (walks, walks[:1])]
        found = compare_rows(job, samples, walks[0].block.width(name))
        return layer.inputs(name) if expert and found.tokens < job.floor else found
    if expert:
        return layer.inputs(name)
    moments = _collect(job, name, walks, list(range(walks[0].states.rows)))
    return Inputs(moments, moments.tokens)


def compare_rows(job: Job, samples: Sequence[Callable[[int], Sample]], size: int) -> Inputs:
    """Moments of the rows that ran through the original too, in two parts, joined by those of the others.

    `samples` are one row's inputs with the original beside, and alone; `size` is their number.
    """
    assert job.rows is not None
    beside, alone = samples
    fitted, held_out = split_rows(job.rows_of(ORIGINAL))
    others = sorted({*job.rows_of(QUANTIZED)} - {*fitted, *held_out})
    parts = [(beside, fitted), (beside, held_out), *([(alone, others)] if others else [])]
    found = collect_parts(parts, job.at_once, size, job.device, job.pool, job.sizes, job.integers)
    both = found[0].join(found[1])
    joined = both.join(found[2]) if others else both
    return Inputs(joined, joined.tokens, Compared(found[0], found[1], both))


def split_rows(rows: list[int]) -> tuple[list[int], list[int]]:
    """The rows that are fitted, and every eighth, which is held out."""
    held_out = rows[HELD_OUT - 1 :: HELD_OUT]
    return [row for row in rows if row not in held_out], held_out


def _collect(job: Job, name: str, walks: list[Walk], rows: list[int]) -> Moments:
    sample = partial(_sample, job, name, walks)
    return collect(sample, rows, job.at_once, walks[0].block.width(name), job.device, job.pool, job.sizes, job.integers)


def _sample(job: Job, name: str, walks: list[Walk], row: int) -> Sample:
    """One row's inputs of a linear; with the original beside, how far they are from its, or what to answer."""
    alone, block, device = len(walks) == 1, walks[0].block, job.device
    expert, writes = ".experts." in name, name.endswith(("o_proj", "down_proj"))
    more = () if alone or not writes else ("mix", "missing") if expert else ("residual",)
    state = walks[0].states.read(row, ("x", "experts", *more))
    x = block.inputs_of(name, state).to(device)
    if alone:
        return Sample(x)
    theirs, place = walks[1], job.rows_of(ORIGINAL).index(row)
    if writes:
        if expert:
            wanted = block.linear(name, x) + _share(name, state).to(device)
        else:
            wanted = theirs.states.read(place, ("residual",))["residual"] - state["residual"]
        return Sample(x, target=wanted.reshape(-1, wanted.shape[-1]).to(device, x.dtype))
    # The same tokens of the original: an expert's by the quantized model's choice.
    beside = {**state, **theirs.states.read(place, ("x",))}
    original = theirs.block.inputs_of(name, beside).to(device)
    return Sample(x, (original.float() - x.float()).to(x.dtype))


def _share(name: str, state: State) -> Tensor:
    """What one expert is to add to its answers `[n, hidden]`: see the module docstring."""
    chosen, mix = state["experts"] == int(name.split(".")[2]), state["mix"]
    token = chosen.any(-1)
    part = mix[chosen] / mix.square().sum(-1)[token]
    return state["missing"][token] * part[:, None]
