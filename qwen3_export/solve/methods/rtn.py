"""Round to nearest: code = clamp(round(w / s) + z).

s = 2·max|w| / (2^bits − 1)              per group       scale_search: absmax
min over s, z of Σ (w − (code − z)·s)²   per group       scale_search: mse, no calibration either
min over s, z of δᵀ H_g δ                per group       scale_search: hessian, δ = w − (code − z)·s

H_g is the group's own block of H = mean x xᵀ over the calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
from qwen3_export.solve.ranges import is_compiled, round_groups

# Weights of a piece: fewer keep more threads busy.
_ROUNDED_AT_ONCE = 1 << 19


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
    found = {}
    for name, weight in group.weights.items():
        unit = shared_global_scale(weights, group.schemes[name])
        pieces = row_pieces(weight, group.schemes[name], max(_ROUNDED_AT_ONCE // weight.shape[1], 1))
        found[name] = solve_rows(name, weight, group, partial(_round, name, group, search, unit), pool, unit, pieces)
    return found


def _round(name: str, group: Group, search: str, unit: float, rows: slice) -> Rows:
    """Some rows: their grid, and their codes; in one go where no Hessian weighs the errors."""
    scheme, part, hessian = group.schemes[name], group.weights[name][rows], group.hessian
    length = scheme.group_length(part.shape[1])
    if hessian is None and is_compiled(part, scheme) and scheme.per_row and part.shape[1] % length == 0:
        scales, zeros, codes, missed, whole = round_groups(part, length, scheme, search != "absmax")
        return Rows(Grid(scheme, scales, zeros), codes, missed, whole)
    importance = None
    if search == "hessian" and hessian is not None:
        importance = _diagonal_blocks(hessian, length) if scheme.per_row else hessian.diagonal()
        search = "hessian" if scheme.per_row else "mse"
    grid = find_grid(part, scheme, search, importance, unit)
    part = part.float()
    codes, delta = round_onto(part, grid)
    return Rows(grid, codes, energy(delta, hessian), energy(part, hessian))


def _diagonal_blocks(hessian: Tensor, length: int) -> Tensor:
    """The groups' own blocks `[groups, length, length]` of H."""
    return torch.stack([hessian[i : i + length, i : i + length] for i in range(0, len(hessian), length)])
