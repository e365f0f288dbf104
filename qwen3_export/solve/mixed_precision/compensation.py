"""Compensation of a unit's error by later linears of its block.

With `target_shift` (`gptq.target_shift`) o_proj and down_proj aim at the original's residual stream. They undo the part
of an error δ in it that is a linear function of their own inputs x:

    δ ← δ − B x,   B = α · mean(δ xᵀ) (mean(x xᵀ) + λI)⁻¹        x: o_proj's, then down_proj's

B is fitted on calibration samples; α in [0, 1] minimises the error on every eighth sample, which is held out. On the
reference model this predicts the remaining KL within a third. Without it the first block's v_proj seems six times as
harmful as it is. Compensation by experts, each on a few tokens, is left out. The error of an embedding is compensated
by the first block, whose hidden states then differ from the original's already at its entrance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qwen3_export.model.block import Block
from qwen3_export.model.decoder import Rope
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.moments import Moments, SampleInputs

EVERY = 2
_HELD_OUT = 8
_PERCDAMP = 0.01
Compensation = dict[int, Tensor]


def fit_compensation(
    block: Block,
    changed: Block,
    stage: int,
    rope: Rope,
    read: Callable[[int], Tensor],
    count: int,
    at_once: int,
    pool: Workers,
    entered: Callable[[int], Tensor] | None = None,
) -> Compensation:
    """`{stage: B [hidden, in]}` for the stages that compensate a change of `stage`.

    `read(sample)` gives a calibration sample's hidden states before the block, `[1, tokens, hidden]`; `entered(sample)`
    gives those that the changed block gets, where they differ. Every other of `count` samples is used. The result is
    empty if there are fewer than eight of these, since none is held out then.
    """
    found: Compensation = {}
    samples = list(range(0, count, EVERY))
    held_out = samples[_HELD_OUT - 1 :: _HELD_OUT]
    if not held_out:
        return found
    fitted = [sample for sample in samples if sample not in held_out]
    for later, description in enumerate(block.stages):
        if later > stage and description.writes_residual and not description.routed:
            width = description.in_features

            def read_inputs(sample: int, later: int = later) -> SampleInputs:
                inputs, _, error = run_compensated(
                    block, changed, found, rope, read(sample), entered and entered(sample)
                )
                return SampleInputs(inputs[later][0], target=error[0])

            gather = partial(collect_moments, read_inputs, at_once=at_once, width=width, device="cpu", pool=pool)
            step = _predict(gather(fitted), gather(held_out))
            if step is not None:
                found[later] = step
    return found


def run_compensated(
    block: Block, changed: Block, compensation: Compensation, rope: Rope, hidden: Tensor, entered: Tensor | None = None
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Inputs of the compensating stages, the original's output, and the remaining error."""
    state, inputs = block.initial_state(hidden), {}
    for stage, description in enumerate(block.stages):
        if description.writes_residual:
            inputs[stage] = state["x"]
        state = block.advance(stage, state, rope)
    error = changed.forward(hidden if entered is None else entered, rope) - state["residual"]
    for stage, step in compensation.items():
        error = error - inputs[stage] @ step.T
    return inputs, state["residual"], error


def _predict(fitted: Moments, held_out: Moments) -> Tensor | None:
    """B times the α that minimises the held-out error; None when α is 0."""
    assert fitted.target is not None
    assert held_out.target is not None
    damped = fitted.hessian.clone()
    damped.diagonal().add_(_PERCDAMP * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    step = torch.cholesky_solve(fitted.target.T, lower).T
    confirmed = float((step * held_out.target).double().sum())
    curvature = float(((step @ held_out.hessian) * step).double().sum())
    return step * min(confirmed / curvature, 1.0) if confirmed > 0 and curvature > 0 else None
