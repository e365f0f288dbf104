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
from qwen3_export.solve.blocks.forward import (
    BlockRun,
    advance_sample,
    input_moments,
    linear_input,
    samples_at_once,
)
from qwen3_export.solve.calibration.collect import collect_moments_of_parts
from qwen3_export.solve.calibration.experts import LayerInputs, LinearInputs
from qwen3_export.solve.calibration.moments import PairedMoments, SampleInputs
from qwen3_export.solve.chunk_sizes import WIDE
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

    def step(first: int, state: State) -> State:
        missing = torch.zeros_like(state["residual"])
        beside = [row for row in range(len(missing)) if first + row in places]
        if beside:
            found = advance_sample(ours, stage, first, {name: tensor[beside] for name, tensor in state.items()})
            wanted = [theirs.states.read(places[first + row], ("residual",))["residual"] for row in beside]
            missing[beside] = torch.cat(wanted) - found["residual"].cpu()
        return {**state, "missing": missing}

    ours.states.advance(step, job.pool, at_once=ours.routed_at_once)


def linear_inputs(job: Job, name: str, runs: list[BlockRun], layer: LayerInputs) -> LinearInputs:
    """Moments of one linear's inputs, paired where the original runs beside.

    An expert that too few tokens reach gets the moments of `layer`, without a comparison.
    """
    starved = is_expert(name) and runs[0].routing.counts[expert_of(name)] < job.token_floor
    if len(runs) > 1 and not starved:
        samples = [partial(_sample, job, name, some) for some in (runs, runs[:1])]
        return paired_inputs(job, samples, runs[0].block.width(name), samples_at_once(runs[0], name))
    if is_expert(name):
        return layer.inputs(name)
    moments = input_moments(runs[0], name)
    return LinearInputs(moments, moments.tokens)


def paired_inputs(
    job: Job, samples: Sequence[Callable[[int], SampleInputs]], width: int, at_once: int | None = None
) -> LinearInputs:
    """Moments of `width` inputs over all samples, and over those with both models.

    The latter are in two parts, fitted and held out. `samples` are two readers of one sample's inputs: with the
    original beside, and without. `at_once` samples are in memory together.
    """
    assert job.samples is not None
    beside, alone = samples
    fitted, held_out = split_held_out(job.samples_of(ORIGINAL))
    others = sorted({*job.samples_of(QUANTIZED)} - {*fitted, *held_out})
    parts = [(beside, fitted), (beside, held_out), *([(alone, others)] if others else [])]
    found = collect_moments_of_parts(
        parts, at_once or job.samples_at_once, width, job.device, job.pool, job.needs_magnitudes, job.int_matmul
    )
    both = found[0].join(found[1])
    joined = both.join(found[2]) if others else both
    return LinearInputs(joined, joined.tokens, PairedMoments(found[0], found[1], None if width > WIDE else both))


def split_held_out(samples: list[int]) -> tuple[list[int], list[int]]:
    """The samples to fit on, and every eighth, which is held out."""
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    return [sample for sample in samples if sample not in held_out], held_out


def _sample(job: Job, name: str, runs: list[BlockRun], sample: int) -> SampleInputs:
    """One sample's inputs of a linear.

    Where the original runs too, also their drift, or the target.
    """
    ours, block, device = runs[0], runs[0].block, job.device
    routing = ours.routing if is_expert(name) else None
    x = linear_input(ours, routing, name, sample).to(device)
    if len(runs) == 1:
        return SampleInputs(x)
    theirs, place = runs[1], job.samples_of(ORIGINAL).index(sample)
    if block.stage_of(name).writes_residual:
        if routing is not None:
            choices = routing.choices(sample, expert_of(name))
            mix, missing = (ours.states.rows(field, sample, choices // routing.each) for field in ("mix", "missing"))
            wanted = block.linear(name, x) + _share(mix, missing, choices % routing.each).to(device)
        else:
            residual = ours.states.read(sample, ("residual",))["residual"]
            wanted = theirs.states.read(place, ("residual",))["residual"] - residual
        return SampleInputs(x, target=wanted.reshape(-1, wanted.shape[-1]).to(device, x.dtype))
    # The same tokens of the original: an expert's by the quantized model's choice.
    if routing is None:
        original = linear_input(theirs, None, name, place)
    else:
        original = theirs.states.rows("x", place, routing.tokens(sample, expert_of(name)))
    return SampleInputs(x, (original.to(device).float() - x.float()).to(x.dtype))


def _share(mix: Tensor, missing: Tensor, choice: Tensor) -> Tensor:
    """One expert's share `[n, hidden]` of `missing` `[n, hidden]`: see the module docstring.

    `mix` `[n, k]` are the weights of its tokens' experts, of which it is number `choice` `[n]`.
    """
    return missing * (mix.gather(1, choice[:, None]) / mix.square().sum(-1, keepdim=True))
