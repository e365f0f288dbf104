"""Noise shaping: later output rows compensate the rounding errors of earlier ones.

    min over Q of tr(G (Q − W) H (Q − W)ᵀ)        G: `calibration.fisher`, H = mean x xᵀ

    U = upper Cholesky factor of (G + λI)⁻¹
    for each batch b of rows:   Q_b = the method's own solve of W_b under H
                                W_r −= U_brᵀ U_bb⁻ᵀ (W_b − Q_b)      for all rows r that follow

This is GPTQ's recursion (Frantar et al. 2022) over output rows, around any solve over input columns; the objective is
that of YAQA (Tseng et al. 2025). It moves errors to outputs that the model's answer depends on least. Pieces of rows
are independent, since G has no entries between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from qwen3_export.solve.rounding.grid import Grid

BATCH = 8
# Damping as a share of G's mean diagonal; G is measured on few tokens.
DAMPING = 0.1
# Few tasks, so that a batch has rows of many pieces: operations on few rows cost as much as on many.
_TASKS = 2

Solve = Callable[[Tensor], tuple[Grid, Tensor]]


def fisher_factors(pieces: Sequence[Tensor]) -> list[Tensor]:
    """U of each piece `[n, n]`, the identity where G is zero."""
    found = []
    for piece in pieces:
        mean = float(piece.diagonal().mean())
        if not math.isfinite(mean) or mean <= 0:
            found.append(torch.eye(len(piece)))
            continue
        damped = piece.double() / mean
        damped.diagonal().add_(DAMPING)
        found.append(torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float())
    return found


def row_tasks(count: int) -> list[slice]:
    """Pieces of rows, divided among at most `_TASKS` tasks.

    A task solves its pieces in step: a batch has rows of all of them.
    """
    step = math.ceil(count / _TASKS)
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def solve_shaped(weight: Tensor, uppers: Sequence[Tensor], solve: Solve) -> tuple[Grid, Tensor]:
    """Grid and codes of rows `[out, in]` whose pieces have the factors `uppers`."""
    lengths = [len(upper) for upper in uppers]
    rest = list(torch.split(weight.clone(), lengths))
    parts: list[list[tuple[Grid, Tensor]]] = [[] for _ in rest]
    for begin in range(0, max(lengths), BATCH):
        batch = [piece[begin : begin + BATCH] for piece in rest]
        grid, codes = solve(torch.cat(batch))
        full = grid.columns(codes.shape)
        errors = torch.cat(batch) - (codes - full.zeros) * full.scales
        sizes = [len(piece) for piece in batch]
        split = torch.split(errors, sizes)
        ends = list(accumulate(sizes))
        for i, upper in enumerate(uppers):
            own = slice(ends[i] - sizes[i], ends[i])
            parts[i].append((grid.rows(own), codes[own]))
            end = begin + sizes[i]
            if sizes[i] and end < lengths[i]:
                lower = upper[begin:end, begin:end].T.contiguous()
                made_up = torch.linalg.solve_triangular(lower, split[i], upper=False)
                rest[i][end:].addmm_(upper[begin:end, end:].T, made_up, alpha=-1)
    grids, found = zip(*(item for part in parts for item in part), strict=True)
    return Grid.below(grids), torch.cat(found)
