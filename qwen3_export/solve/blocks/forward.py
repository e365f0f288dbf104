"""Samples on their way through one block, and moments of their linears' inputs.

    start_run       hidden states before the block ─▶ state before the first stage
    run_stage       all samples through the linears of a stage, to the inputs of the next
    input_moments   moments of one linear's inputs at the present stage

`quantize` and `recipes search` both run samples this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from qwen3_export.core.architecture import expert_of, is_expert
from qwen3_export.model.block import Block, State
from qwen3_export.model.decoder import Rope
from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.calibration.activations import SampleFile, SpareFiles
from qwen3_export.solve.calibration.block_states import BlockStates
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.experts import LayerInputs
from qwen3_export.solve.calibration.moments import Moments, SampleInputs
from qwen3_export.solve.calibration.routing import Routing, expert_inputs, routing_of
from qwen3_export.solve.chunk_sizes import ROUTED_TOKENS, TOKENS_AT_ONCE


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

    @cached_property
    def routing(self) -> Routing:
        """Where the router sends the tokens.

        It is computed by the pool, so the pool's own threads may not be the first to ask for it.
        """
        experts, found = max(stage.experts for stage in self.block.stages), list[Routing]()

        def find(_: Sequence[str]) -> None:
            found.append(routing_of(self.states, experts, self.settings.pool))

        def dump(_: str) -> Parts:
            return {"order": found[0].order, "ends": found[0].ends, "each": found[0].each}

        def load(_: str, parts: Parts) -> None:
            found.append(Routing(parts["order"], parts["ends"], parts["each"]))

        self.settings.pool.share("routing", ["all"], find, dump, load)
        return found[0]

    @property
    def routed_at_once(self) -> int:
        """Samples that pass through experts together.

        Each expert is read or dequantized once for all of them.
        """
        return max(1, ROUTED_TOKENS // self.settings.rope[0].shape[0])


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
    lasting = ("residual",) if last and run.settings.durable else ()
    at_once = run.routed_at_once if run.block.stages[stage].routed else 1
    run.states.advance(step, run.settings.pool, idle, lasting, at_once)


def advance_sample(run: BlockRun, stage: int, _sample: int, state: State) -> State:
    """The state of one or several samples after a stage, on the CPU."""
    moved = {name: tensor.to(run.settings.device) for name, tensor in state.items()}
    after = run.block.advance(stage, moved, run.settings.rope)
    # An untouched field must stay the same object, so that it is not written to the disk again.
    return {name: state[name] if tensor is moved.get(name) else tensor for name, tensor in after.items()}


def input_moments(run: BlockRun, name: str) -> Moments:
    """Moments of the inputs of one linear, or of the router.

    They are taken over all samples; names are local.
    """
    routing = run.routing if is_expert(name) else None

    def read(sample: int) -> SampleInputs:
        return SampleInputs(linear_input(run, routing, name, sample).to(run.settings.device))

    return collect(run, name, read, range(run.states.num_samples))


def linear_input(run: BlockRun, routing: Routing | None, name: str, sample: int) -> Tensor:
    """The vectors `[n, in]` of one sample that reach a linear.

    `routing` is needed for an expert's linear.
    """
    if routing is None:
        return run.block.inputs_of(name, run.states.read(sample, ("x",)))
    return expert_inputs(run.states, routing, run.block.stage_of(name), name, sample)


def collect(run: BlockRun, name: str, read: Callable[[int], SampleInputs], samples: Sequence[int]) -> Moments:
    """Moments of what `read` gives of each sample.

    They are as wide as the inputs of the linear `name`.
    """
    use, at_once = run.settings, samples_at_once(run, name)
    return collect_moments(
        read, samples, at_once, run.block.width(name), use.device, use.pool, use.magnitudes, use.int_matmul
    )


def samples_at_once(run: BlockRun, name: str) -> int:
    """Samples whose inputs of one linear are in memory together.

    There are more for an expert that few of their tokens reach.
    """
    usual = run.settings.samples_at_once
    return run.routing.at_once(expert_of(name), usual, TOKENS_AT_ONCE) if is_expert(name) else usual


def layer_inputs(run: BlockRun, token_floor: int, fallback: str) -> LayerInputs:
    """What the linears of a block read at the present stage.

    It knows the rule for experts that few tokens reach.
    """
    moments_of = partial(input_moments, run)
    return LayerInputs(run.block, run.states, token_floor, fallback, moments_of, run.settings.pool, run.settings.device)
