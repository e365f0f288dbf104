"""Samples on their way through one block, and moments of their linears' inputs.

    start_run       hidden states before the block ─▶ state before the first stage
    run_stage       all samples through the linears of a stage, to the inputs of the next
    input_moments   moments of one linear's inputs at the present stage

`quantize` and `recipes search` both run samples this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qwen3_export.model.block import Block, State
from qwen3_export.model.decoder import Rope
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.activations import BlockStates, SampleFile, SpareFiles
from qwen3_export.solve.calibration.experts import LayerInputs
from qwen3_export.solve.calibration.moments import Moments, SampleInputs, collect_moments


@dataclass(frozen=True)
class RunSettings:
    """How samples run through a block, and how their inputs are summed.

    `samples_at_once` are in memory together; `magnitudes` asks for mean |x| and max |x| too, `int_matmul` lets
    fp32 inputs be rounded to bytes for their sums (`calibration.gram_int8`). `durable`: the hidden states behind the
    block are to outlast the process.
    """

    pool: Workers
    rope: Rope
    samples_at_once: int
    device: str = "cpu"
    magnitudes: bool = True
    int_matmul: bool = False
    spare_files: SpareFiles | None = None
    durable: bool = False


@dataclass(frozen=True)
class BlockRun:
    """One model's block, and the state of each sample in it."""

    block: Block
    states: BlockStates
    settings: RunSettings


def start_run(
    settings: RunSettings, block: Block, before: SampleFile, folder: Path, count: int,
    chosen: Sequence[int] | None = None,
) -> BlockRun:  # fmt: skip
    """A run of the `count` samples in `before`, or of the `chosen` ones.

    The samples are at the entrance of the block.

    `before` is a file handle of this run's own, which it closes; the file itself stays. States lie in `folder`.
    """
    folder.mkdir(exist_ok=True)
    before.lasting = True
    # All samples in their order need no copy of their hidden states.
    files = {"residual": before} if chosen is None else {}
    states = BlockStates(folder, count if chosen is None else len(chosen), files, settings.spare_files)

    def step(place: int, state: State) -> State:
        hidden = state["residual"] if chosen is None else before.read(chosen[place])
        entered = block.initial_state(hidden.to(settings.device))
        return {**entered, "residual": state.get("residual", hidden)}

    try:
        states.advance(step, settings.pool)
    finally:
        if chosen is not None:
            before.close()
    return BlockRun(block, states, settings)


def run_stage(run: BlockRun, stage: int) -> None:
    """Run all samples through the linears of a stage."""
    step = partial(advance_sample, run, stage)
    last = stage == len(run.block.stages) - 1
    # Stages that do not write to the residual stream need not read it.
    idle = () if run.block.stages[stage].writes_residual else ("residual",)
    run.states.advance(step, run.settings.pool, idle, ("residual",) if last and run.settings.durable else ())


def advance_sample(run: BlockRun, stage: int, _sample: int, state: State) -> State:
    """One sample's state behind a stage, in this machine's memory."""
    moved = {name: tensor.to(run.settings.device) for name, tensor in state.items()}
    after = run.block.advance(stage, moved, run.settings.rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def input_moments(run: BlockRun, name: str) -> Moments:
    """Moments of the inputs of one linear, or of the router.

    They are taken over all samples; names are local.
    """

    def read(sample: int) -> SampleInputs:
        state = run.states.read(sample, ("x", "experts"))
        return SampleInputs(run.block.inputs_of(name, state).to(run.settings.device))

    return collect(run, name, read, range(run.states.num_samples))


def collect(run: BlockRun, name: str, read: Callable[[int], SampleInputs], samples: Sequence[int]) -> Moments:
    """Moments of what `read` gives of each sample.

    They are as wide as the inputs of the linear `name`.
    """
    use = run.settings
    return collect_moments(
        read, samples, use.samples_at_once, run.block.width(name), use.device, use.pool, use.magnitudes, use.int_matmul
    )


def layer_inputs(run: BlockRun, token_floor: int, fallback: str) -> LayerInputs:
    """What the linears of a block read at the present stage.

    It knows the rule for experts that few tokens reach.
    """
    moments_of = partial(input_moments, run)
    return LayerInputs(run.block, run.states, token_floor, fallback, moments_of, run.settings.pool, run.settings.device)
