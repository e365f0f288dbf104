"""The size budget: one choice per unit, the least loss that fits.

A multiple-choice knapsack, solved exactly.

    min Σ loss[u][c_u]   subject to   Σ bits[u][c_u] ≤ capacity

Every unit first gets its smallest choice. The rest of the capacity is divided into cells, whose size is the greatest
common divisor of all extra sizes. best[k] is the least loss of the units so far with at most k extra cells:

    best'[k] = min over c of best[k − extra(c)] + loss(c)

If there would be more than `MOST_CELLS` cells, they are made larger and sizes are rounded up to cells. The budget still
holds, and the answer wastes at most a cell per unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_CELLS = 1 << 17


@dataclass(frozen=True)
class Choice:
    """One way to store a unit: its size in bits, and its loss."""

    bits: int
    loss: float


def choose(units: Sequence[Sequence[Choice]], capacity: int, most_cells: int = MOST_CELLS) -> list[int] | None:
    """Index of the chosen `Choice` of each unit; None when nothing fits.

    Nothing fits when even the smallest choices exceed `capacity` bits. Of equal losses the first one listed is taken.
    """
    smallest = [min(choice.bits for choice in unit) for unit in units]
    room = capacity - sum(smallest)
    if room < 0:
        return None
    extra = [[choice.bits - least for choice in unit] for unit, least in zip(units, smallest, strict=True)]
    room = min(room, sum(max(sizes) for sizes in extra))
    cell = _cell(extra, room, most_cells)
    sizes = [[-(-size // cell) for size in unit] for unit in extra]
    losses = [[choice.loss for choice in unit] for unit in units]
    return _solve(sizes, losses, room // cell)


def _cell(extra: list[list[int]], room: int, most_cells: int) -> int:
    """Bits per cell: exact unless there would be too many cells."""
    exact = math.gcd(*(size for unit in extra for size in unit)) or 1
    return exact if room // exact <= most_cells else -(-room // most_cells)


def _solve(sizes: list[list[int]], losses: list[list[float]], cells: int) -> list[int]:
    best = np.zeros(cells + 1)
    taken: list[NDArray[np.uint8]] = []
    for unit_sizes, unit_losses in zip(sizes, losses, strict=True):
        options = np.full((len(unit_sizes), cells + 1), np.inf)
        for row, size, loss in zip(options, unit_sizes, unit_losses, strict=True):
            if size <= cells:
                row[size:] = best[: cells + 1 - size] + loss
        picks = options.argmin(0)
        best = options.min(0)
        taken.append(picks.astype(np.uint8))
    chosen, at = [], cells
    for picks, unit_sizes in zip(reversed(taken), reversed(sizes), strict=True):
        chosen.append(int(picks[at]))
        at -= unit_sizes[chosen[-1]]
    return chosen[::-1]
