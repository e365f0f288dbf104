"""Inputs of the quantized model's linears, compared with the original's on the same samples.

Every eighth of the samples that run through both models is held out (`gptq.target_shift`).

An expert is compared on the tokens that reach it in the quantized model, even where the original sends them to other
experts. For gate_proj and up_proj the original's inputs are those of the same tokens. The target of down_proj is its
output y plus its share of `missing`, the error that the layer's experts together leave in the residual stream:

    y + mix / Σ mix² · missing      Σ over the token's experts

If every expert met its target, nothing would be missing; it is the smallest change of their outputs that achieves this.
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

    This is done before experts write to the residual stream. `missing` is the original's residual stream after this
    stage, which it has already run, less the one that the experts would leave. It is zero for samples that do not run
    through the original.
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
    """Moments of one linear's inputs, paired where the original runs beside.

    An expert that too few tokens reach gets the moments of `layer`, without a comparison.
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
    """Moments of `width` inputs over all samples, and over those with both models.

    The latter are in two parts, fitted and held out. `samples` are two readers of one sample's inputs: with the
    original beside, and without.
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
    """The samples to fit on, and every eighth, which is held out."""
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    return [sample for sample in samples if sample not in held_out], held_out


def _sample(job: Job, name: str, runs: list[BlockRun], sample: int) -> SampleInputs:
    """One sample's inputs of a linear, with drift or target if the original runs."""
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
    # The original's inputs of the same tokens, which for an expert the quantized model has chosen.
    beside = {**state, **theirs.states.read(place, ("x",))}
    original = theirs.block.inputs_of(name, beside).to(device)
    return SampleInputs(x, (original.float() - x.float()).to(x.dtype))


def _share(name: str, state: State) -> Tensor:
    """One expert's share `[n, hidden]` of `missing`; see the module docstring."""
    chosen, mix = state["experts"] == expert_of(name), state["mix"]
    token = chosen.any(-1)
    part = mix[chosen] / mix.square().sum(-1)[token]
    return state["missing"][token] * part[:, None]
