"""Who solves the blocks: this process, or workers on a cluster.

The block loop asks for one block after another, and for what was solved to be written; it knows nothing else of it.
"""

from __future__ import annotations

from typing import Protocol

from qwen3_export.solve.blocks import rtn_without_torch
from qwen3_export.solve.job import BlockRecord, Job, SolvedBlock
from qwen3_export.solve.output_folder import QuantizedFolder

# Folder below a run's state: what workers of a cluster leave of the block that they are solving.
PIECES = "pieces"


class Executor(Protocol):
    """What the block loop calls."""

    def solve(self, job: Job, layer: int) -> BlockRecord:
        """Solve a block.

        Where the method looks at inputs, the hidden states behind the block are left.
        """

    def write(self, job: Job, target: QuantizedFolder, layer: int) -> None:
        """Bring a solved block's shard to the disk.

        The next block may be solved meanwhile.
        """

    def written(self, layer: int) -> None:
        """Told when a block counts as done.

        What was kept to go on in the middle of it may go.
        """


class Local:
    """All the work in this process, by the job's pool of threads."""

    def __init__(self) -> None:
        self._solved: dict[int, SolvedBlock] = {}

    def solve(self, job: Job, layer: int) -> BlockRecord:
        """See `Executor`."""
        self._solved[layer] = solve_block(job, layer)
        return self._solved[layer].record

    def write(self, job: Job, target: QuantizedFolder, layer: int) -> None:
        """See `Executor`."""
        target.write_block(layer, self._solved.pop(layer))

    def written(self, layer: int) -> None:
        """See `Executor`."""


def solve_block(job: Job, layer: int) -> SolvedBlock:
    """One block by the job's method."""
    if job.without_torch:
        return rtn_without_torch.solve_block(job.checkpoint, job.recipe, job.options, layer, job.pool)
    from qwen3_export.solve.blocks.block import solve_block as solve

    return solve(job, layer)
