"""The embedding, which is also the head when tied, where the recipe names it.

    embedding ─▶ block 0 ─▶ … ─▶ last block ─▶ norm ─▶ head
    first: block 0 is calibrated on what is shipped      last: see `head`

Rows of an embedding are looked up and not multiplied, so only their own error e matters. It costs ½ eᵀ G e, where G is
the mean of g gᵀ over the slopes g at looked-up rows (`calibration.fisher`). Where a pass back through the original
measured G, the embedding is solved against it by the recipe's method; elsewhere it is rounded to nearest. The matrix of
a tied model is embedding and head. It is solved first, against

    H = G + mean (1 − Σ p²) · mean x xᵀ     x: inputs of the head in the original model, p: its answers

That is what an error costs in nats, to second order: a token is looked up about as often as it is foretold. A tenth of
G is made even, for text that looks up other rows. Without G, H = ½ I + ½ mean x xᵀ / mean(diag). With 4 bits in groups
of 32 for this matrix alone, KL is 0.0110 without and 0.0091 with G (`outliers` of the benchmarks, 64 × 256 tokens).

A vocabulary has many rows, which are independent of each other once the Hessian is known. So they are read and solved
some at a time, and only the codes are in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import join_rows
from qwen3_export.model.block import Block
from qwen3_export.model.decoder import load_block, rope_tables
from qwen3_export.model.table import Table, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.blocks.head_inputs import head_moments
from qwen3_export.solve.calibration.activations import SampleFile, share_samples, write_embeddings
from qwen3_export.solve.calibration.fisher import FisherInformation
from qwen3_export.solve.chunk_sizes import out_rows_at_once
from qwen3_export.solve.job import Job, SolvedLinear
from qwen3_export.solve.method import LinearGroup, SolvedWeight
from qwen3_export.solve.rounding.nearest import round_group
from qwen3_export.solve.rounding.row_chunks import quadratic_form

# For a tied matrix the original runs on every fourth sample before the block loop begins.
AHEAD_EVERY = 4
# The share of G that is made even.
_EVEN = 0.1


def solve_embedding(job: Job, tick: Callable[[], object] = lambda: None) -> SolvedLinear | None:
    """Solve the embedding, which is also the head when tied.

    Returns None if it stays in 16 bits. For a tied matrix with calibration samples the original runs through all blocks
    first; `tick` is called once per block.
    """
    scheme = job.recipe.scheme_for(EMBEDDING)
    if scheme is None:
        return None
    tied = job.checkpoint.config.tie_word_embeddings
    if not tied and job.fisher is None:
        solve_rows = partial(_round, job.pool, scheme)
        return SolvedLinear(solve_row_chunks(job.checkpoint, EMBEDDING, solve_rows, None, job.device), 0, "rtn")
    hessian, tokens = None, 0
    if not tied and job.fisher is not None:
        hessian, tokens = _of_rows(job.fisher, job.device), job.fisher.tokens()
    elif job.samples is not None:
        samples = job.samples.ids[::AHEAD_EVERY]
        with closing(job.hidden_file(job.scratch / "ahead.samples")) as file:
            hessian, tokens = tied_hessian(job.checkpoint, samples, file, job.pool, job.device, tick, job.fisher)
        file.path.unlink()

    def solve(weight: Tensor) -> SolvedWeight:
        group = LinearGroup({EMBEDDING: weight}, {EMBEDDING: scheme}, hessian, tokens)
        return job.method.solve(group, job.options, job.pool)[EMBEDDING]

    return SolvedLinear(solve_row_chunks(job.checkpoint, EMBEDDING, solve, hessian, job.device), tokens)


def _of_rows(fisher: FisherInformation, device: str) -> Tensor:
    """G `[hidden, hidden]` of looked-up rows, a tenth spread evenly over channels."""
    found = fisher.of_rows().to(device)
    return torch.lerp(found, torch.eye(len(found), device=device) * found.diagonal().mean(), _EVEN)


def _round(pool: Workers, scheme: QuantScheme, weight: Tensor) -> SolvedWeight:
    return round_group(LinearGroup({EMBEDDING: weight}, {EMBEDDING: scheme}), "mse", pool)[EMBEDDING]


def tied_hessian(
    checkpoint: Checkpoint, samples: Sequence[NDArray], file: SampleFile, pool: Workers, device: str = "cpu",
    tick: Callable[[], object] = lambda: None, fisher: FisherInformation | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """H of a tied matrix (see the module docstring), and its number of tokens.

    The original runs once over the samples, with hidden states in `file`; `tick` is called once per block.
    """
    config = checkpoint.config
    table, rope = Table(checkpoint.read(f"{EMBEDDING}.weight")), rope_tables(config, 0, len(samples[0]), device)
    write_embeddings(file, table, samples, pool)
    for layer in range(config.num_layers):
        block = load_block(checkpoint, layer, device)

        def step(sample: int, block: Block = block) -> None:
            file.write(sample, block.forward(file.read(sample).to(device), rope))

        share_samples(pool, "ahead", step, len(samples), file)
        tick()
    moments = head_moments(checkpoint, [file], range(len(samples)), len(samples[0]), pool, device)
    if fisher is not None:
        return fisher.head_share() * moments.hessian + _of_rows(fisher, device), moments.tokens
    own = moments.hessian / moments.hessian.diagonal().mean()
    return (own + torch.eye(len(own), device=device)) / 2, moments.tokens


def solve_row_chunks(
    checkpoint: Checkpoint,
    module: str,
    solve: Callable[[Tensor], SolvedWeight],
    hessian: Tensor | None,
    device: str = "cpu",
    columns: Tensor | None = None,
) -> SolvedWeight:
    """Solve a matrix `[vocab, hidden]` in pieces of rows, after multiplying its columns.

    The error that is returned is that of the whole.
    """
    rows, width = checkpoint.config.outer_matrices()[module]
    parts, error, total, step = [], 0.0, 0.0, out_rows_at_once(width)
    for begin in range(0, rows, step):
        piece = checkpoint.rows(f"{module}.weight", begin, min(begin + step, rows))
        weight = to_torch(piece).float().to(device)
        weight = weight if columns is None else weight * columns
        solved = solve(weight)
        size = quadratic_form(weight, hessian)
        parts.append(solved.tensor)
        error, total = error + solved.error * size, total + size
    return SolvedWeight(join_rows(parts), error / total if total > 0 else 0.0)
