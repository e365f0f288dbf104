"""The router's choices for every sample, to read one expert's inputs alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwen3_export.core.architecture import Stage, expert_of
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.block_states import BlockStates


@dataclass(frozen=True)
class Routing:
    """Where the router of a layer sends the tokens of every sample.

    Token t's j-th choice is number k · t + j of a sample's choices; `order` has them by expert, those of each in
    their order, and `ends` where each expert's end.
    """

    order: list[Tensor]
    ends: list[list[int]]
    each: int

    def choices(self, sample: int, expert: int) -> Tensor:
        """Numbers of a sample's choices of one expert."""
        ends = self.ends[sample]
        return self.order[sample][ends[expert - 1] if expert else 0 : ends[expert]]

    def tokens(self, sample: int, expert: int) -> Tensor:
        """A sample's tokens that are sent to one expert."""
        return self.choices(sample, expert) // self.each

    def at_once(self, expert: int, usual: int, tokens: int) -> int:
        """Samples that have about `tokens` tokens for one expert, at least `usual`."""
        count, samples = self.counts[expert], len(self.ends)
        return usual if count == 0 else min(max(usual, tokens * samples // count), samples)

    @cached_property
    def counts(self) -> list[int]:
        """Number of tokens that are sent to each expert, over all samples."""
        totals = torch.tensor(self.ends).sum(0)
        return torch.diff(totals, prepend=torch.zeros(1, dtype=totals.dtype)).tolist()


def routing_of(states: BlockStates, experts: int, pool: Workers) -> Routing:
    """The routing of a layer, from states at stage 2 or 3."""

    def one(sample: int) -> tuple[Tensor, list[int], int]:
        chosen = states.read(sample, ("experts",))["experts"]
        flat = chosen.flatten()
        ends = torch.bincount(flat, minlength=experts).cumsum(0)
        return flat.argsort(stable=True), ends.tolist(), chosen.shape[-1]

    found = pool.map(one, range(states.num_samples))
    return Routing([order for order, _, _ in found], [ends for _, ends, _ in found], found[0][2])


def expert_inputs(states: BlockStates, routing: Routing, stage: Stage, name: str, sample: int) -> Tensor:
    """The inputs `[n, in]` of an expert's linear in one sample, as `Block.inputs_of`."""
    expert = expert_of(name)
    rows = routing.tokens(sample, expert) if stage.norm else routing.choices(sample, expert)
    return states.rows("x", sample, rows)
