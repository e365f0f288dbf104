"""Tokens that reach each expert, and statistics for experts that too few reach.

The router sends each token to a few experts, and some experts get hardly any token. n tokens span at most n
directions of the input space. In all other directions the Hessian says that errors cost nothing, and a solver would
put its errors there. An expert that fewer than `token_floor` tokens reach is therefore treated by the recipe's rule:

    share   H = (n · H_own + (floor − n) · H_layer) / floor
    rtn     rounded to nearest by the squared error of its weights; H only sets a static input scale

H_layer is the Hessian that this expert would have if the router sent it every token of the layer. For gate_proj and
up_proj it is the mean of x xᵀ over the layer's common input, computed once per layer. For down_proj evenly chosen
tokens pass through this expert's own quantized gate_proj and up_proj. The mean |x| is mixed in the same way; the peak
is the larger of both.

Only one expert's moments are in memory at a time, beside those of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qwen3_export.core.architecture import ROUTER, Stage, expert_of, is_expert
from qwen3_export.model.block import Block
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.block_states import BlockStates
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.moments import Moments, PairedMoments, SampleInputs
from qwen3_export.solve.chunk_sizes import SAMPLE_TOKENS

_PIECE = 256


@dataclass(frozen=True)
class LinearInputs:
    """Statistics of the inputs that a group of linears is solved with.

    `tokens` counts the tokens that reached the linears themselves. `paired` compares with the original, where it runs
    beside. `fallback` is the rule that was applied to an expert below the floor.
    """

    moments: Moments
    tokens: int
    paired: PairedMoments | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class LayerInputs:
    """A block at one stage with all samples in it.

    `collect_all(name)` gives one linear's moments over all samples.
    """

    block: Block
    states: BlockStates
    token_floor: int
    fallback: str
    collect_all: Callable[[str], Moments]
    pool: Workers
    device: str = "cpu"

    def inputs(self, name: str) -> LinearInputs:
        """Statistics of one linear's inputs, by local name, after the rule for experts."""
        own = self.collect_all(name)
        lacking = self.token_floor - own.tokens if is_expert(name) else 0
        if lacking <= 0:
            return LinearInputs(own, own.tokens)
        layer = self._common if self._stage(name).norm else self._inner(name)
        return LinearInputs(own.join(replace(layer, tokens=lacking)), own.tokens, fallback=self.fallback)

    def prepare(self, stage: Stage, counts: Sequence[int]) -> None:
        """Compute what starved experts share, with all threads.

        Several are then solved side by side. `counts`: tokens that reached each expert.
        """
        if min(counts) < self.token_floor:
            _ = self._common if stage.norm else self._sampled

    def _stage(self, name: str) -> Stage:
        return self.block.config.block(self.block.layer).stage_of(name)

    @cached_property
    def _common(self) -> Moments:
        """Moments of the input that the router and every expert share."""
        return self.collect_all(ROUTER)

    def _inner(self, name: str) -> Moments:
        """Moments of the sampled tokens after one expert's gate_proj and up_proj."""
        first = next(stage for stage in self.block.stages if stage.routed)
        names = first.groups[expert_of(name)]
        pieces = torch.split(self._sampled, _PIECE)

        def sample(piece: int) -> SampleInputs:
            # In fp32: there are so few tokens that rounding to 16 bits would show in the sums.
            return SampleInputs(self.block.combine(first, names, pieces[piece]).float())

        size = self.block.width(name)
        return collect_moments(sample, range(len(pieces)), len(pieces), size, self.device, self.pool)

    @cached_property
    def _sampled(self) -> Tensor:
        """The layer's common input `[tokens, hidden]` of tokens spread evenly over all samples."""
        norm = next(stage.norm for stage in self.block.stages if stage.routed)
        assert norm is not None
        length = self.states.read(0)["residual"].shape[-2]
        total = self.states.num_samples * length
        count = min(max(self.token_floor, SAMPLE_TOKENS), total)
        chosen = torch.arange(count) * total // count

        def some(sample: int) -> Tensor:
            here = chosen[chosen // length == sample] - sample * length
            residual = self.states.read(sample, ("residual",))["residual"][0, here]
            return self.block.norm(norm, residual.to(self.device))

        return torch.cat(self.pool.map(some, torch.unique(chosen // length).tolist()))
