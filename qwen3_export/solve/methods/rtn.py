"""Round to nearest: code = clamp(round(w / s) + z).

s = 2·max|w| / (2^bits − 1)              per group       scale_search: absmax
min over s, z of Σ (w − (code − z)·s)²   per group       scale_search: mse, no calibration either
min over s, z of δᵀ H_g δ                per group       scale_search: hessian, δ = w − (code − z)·s

H_g is the group's own block of H = mean x xᵀ over the calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.model.workers import Workers
from qwen3_export.solve.fold import FOLDS
from qwen3_export.solve.grid import SEARCHES, Grid, find_grid, round_onto, shared_global_scale
from qwen3_export.solve.method import (
    Group,
    Rows,
    Solved,
    check_choice,
    check_finite,
    check_inputs,
    energy,
    row_pieces,
    solve_rows,
)

# Weights whose grid is searched in one go: more share a look at the table, fewer keep all threads busy.
_SEARCHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Options:
    """Options of the recipe.

    `scale_search`: `absmax` covers the whole range, `mse` and `hessian` try shrunken ranges per group.
    `fold`: `none`, `awq` or `smoothquant`; see `solve.fold`.
    """

    scale_search: str = "mse"
    fold: str = "none"

    def __post_init__(self) -> None:
        check_choice("scale_search", self.scale_search, SEARCHES)
        check_choice("fold", self.fold, FOLDS)


def needs_inputs(options: Options) -> bool:
    """Plain rounding needs no inputs; the weighted search does."""
    return options.scale_search == "hessian"


def needs_original(_options: Options) -> bool:
    """Rounding compares with nothing."""
    return False


def needs_outputs(_options: Options) -> int:
    """Rows are rounded on their own."""
    return 0


def solve(group: Group, options: Options, pool: Workers) -> dict[str, Solved]:
    """Round every weight of the group; the error is relative to its energy, weighted by the inputs if known."""
    return round_group(group, options.scale_search, pool)


def round_group(group: Group, search: str, pool: Workers) -> dict[str, Solved]:
    """Search each weight's grid and round onto it, `[out, in]` by pieces of rows."""
    check_inputs(group)
    for name, weight in group.weights.items():
        check_finite(name, weight)
    weights = list(group.weights.values())
    units = {name: shared_global_scale(weights, group.schemes[name]) for name in group.weights}
    grids = _find_grids(group, search, units, pool)
    return {name: _round(name, grids[name], units[name], group, pool) for name in group.weights}


def _find_grids(group: Group, search: str, units: dict[str, float], pool: Workers) -> dict[str, list[Grid]]:
    """Every weight's grid in parts of rows, those of all weights side by side."""
    work = [
        (name, rows)
        for name, weight in group.weights.items()
        for rows in row_pieces(weight, group.schemes[name], max(_SEARCHED_AT_ONCE // weight.shape[1], 1))
    ]

    def one(item: tuple[str, slice]) -> Grid:
        name, rows = item
        scheme, found, importance = group.schemes[name], search, None
        if search == "hessian" and group.hessian is not None:
            length = scheme.group_length(len(group.hessian))
            importance = _diagonal_blocks(group.hessian, length) if scheme.per_row else group.hessian.diagonal()
            found = "hessian" if scheme.per_row else "mse"
        return find_grid(group.weights[name][rows], scheme, found, importance, units[name])

    found = pool.map(one, work)
    return {
        name: [grid for grid, (owner, _) in zip(found, work, strict=True) if owner == name] for name in group.weights
    }


def _round(name: str, grids: list[Grid], unit: float, group: Group, pool: Workers) -> Solved:
    scheme, weight = group.schemes[name], group.weights[name]
    scales, zeros = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    tall = scheme.rows_per_scale(len(weight))

    def piece(rows: slice) -> Rows:
        covered = slice(rows.start // tall, -(-rows.stop // tall))
        part, grid = weight[rows].float(), Grid(scheme, scales[covered], zeros[covered])
        codes, delta = round_onto(part, grid)
        return Rows(grid, codes, energy(delta, group.hessian), energy(part, group.hessian))

    return solve_rows(name, weight, group, piece, pool, unit)


def _diagonal_blocks(hessian: Tensor, length: int) -> Tensor:
    """The groups' own blocks `[groups, length, length]` of H."""
    return torch.stack([hessian[i : i + length, i : i + length] for i in range(0, len(hessian), length)])
