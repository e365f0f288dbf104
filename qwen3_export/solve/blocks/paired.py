"""Inputs of the quantized model's linears, compared with the original's on the same samples.

Every eighth of the samples that run through both models is held out (`gptq.target_shift`). An expert is compared
on the tokens that reach it in the quantized model, wherever the original sends them. The linears that read the
layer's input are given the original's inputs of these tokens. The one that writes to the residual stream
should answer y, its own output, and its share of `missing`, what the layer's experts together leave out:

    y + mix / Σ mix² · missing      Σ over the token's experts

If every expert answered that, nothing would be missing, and no smaller change of their answers would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qwen3_export.core.architecture import expert_of, is_expert
from qwen3_export.model.block import State
from qwen3_export.solve.blocks.forward import BlockRun, advance_sample, input_moments
from qwen3_export.solve.calibration.experts import LayerInputs, LinearInputs
from qwen3_export.solve.calibration.moments import PairedMoments, SampleInputs, collect_moments_of_parts
from qwen3_export.solve.job import ORIGINAL, QUANTIZED, Job

HELD_OUT = 8


def add_missing_output(job: Job, runs: list[BlockRun], stage: int) -> None:
    """Add `missing` `[1, tokens, hidden]` to the quantized model's states.

    This is done before experts write to the residual stream.

    It is what the original, a stage ahead, has there and they will not; zeros where the original does not run.
    """
    ours, theirs = runs
    places = {sample: place for place, sample in enumerate(job.samples_of(ORIGINAL))}

    def step(sample: int, state: State) -> State:
        if sample not in places:
            return {**state, "missing": torch.zeros_like(state["residual"])}
        found = advance_sample(ours, stage, sample, state)["residual"].cpu()
        wanted = theirs.states.read(places[sample], ("residual",))["residual"]
        return {**state, "missing": wanted - found}

    ours.states.advance(step, job.pool)


def linear_inputs(job: Job, name: str, runs: list[BlockRun], layer: LayerInputs) -> LinearInputs:
    """The moments that one linear is solved against.

    They are paired where the original runs too.

    An expert that too few tokens reach gets what `layer` says, without the original.
    """
    if len(runs) > 1:
        samples = [partial(_sample, job, name, some) for some in (runs, runs[:1])]
        found = paired_inputs(job, samples, runs[0].block.width(name))
        return layer.inputs(name) if is_expert(name) and found.tokens < job.token_floor else found
    if is_expert(name):
        return layer.inputs(name)
    moments = input_moments(runs[0], name)
    return LinearInputs(moments, moments.tokens)


def paired_inputs(job: Job, samples: Sequence[Callable[[int], SampleInputs]], width: int) -> LinearInputs:
    """Moments of the samples that run through both models, in two parts.

    Those of the other samples are joined to them.

    `samples` read one sample's inputs with the original beside, and alone; `width` is their number.
    """
    assert job.samples is not None
    beside, alone = samples
    fitted, held_out = split_held_out(job.samples_of(ORIGINAL))
    others = sorted({*job.samples_of(QUANTIZED)} - {*fitted, *held_out})
    parts = [(beside, fitted), (beside, held_out), *([(alone, others)] if others else [])]
    found = collect_moments_of_parts(
        parts, job.samples_at_once, width, job.device, job.pool, job.needs_magnitudes, job.int_matmul
    )
    both = found[0].join(found[1])
    joined = both.join(found[2]) if others else both
    return LinearInputs(joined, joined.tokens, PairedMoments(found[0], found[1], both))


def split_held_out(samples: list[int]) -> tuple[list[int], list[int]]:
    """The samples that are fitted, and every eighth, which is held out."""
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    return [sample for sample in samples if sample not in held_out], held_out


def _sample(job: Job, name: str, runs: list[BlockRun], sample: int) -> SampleInputs:
    """One sample's inputs of a linear.

    Where the original runs too, also their drift, or the target.
    """
    alone, block, device = len(runs) == 1, runs[0].block, job.device
    expert, writes = is_expert(name), block.config.block(block.layer).stage_of(name).writes_residual
    more = () if alone or not writes else ("mix", "missing") if expert else ("residual",)
    state = runs[0].states.read(sample, ("x", "experts", *more))
    x = block.inputs_of(name, state).to(device)
    if alone:
        return SampleInputs(x)
    theirs, place = runs[1], job.samples_of(ORIGINAL).index(sample)
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
    """One expert's share `[n, hidden]` of `missing`: see the module docstring."""
    chosen, mix = state["experts"] == expert_of(name), state["mix"]
    token = chosen.any(-1)
    part = mix[chosen] / mix.square().sum(-1)[token]
    return state["missing"][token] * part[:, None]
