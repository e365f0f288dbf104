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
from qwen3_export.solve.grid import SEARCHES, find_grid, round_to, shared_global_scale
from qwen3_export.solve.method import Group, Rows, Solved, check_choice, check_finite, check_inputs, energy, solve_rows


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
    solved = {}
    for name, weight in group.weights.items():
        check_finite(name, weight)
        scheme, hessian = group.schemes[name], group.hessian
        global_scale = shared_global_scale(list(group.weights.values()), scheme)
        found, importance = search, None
        if search == "hessian" and hessian is not None:
            blocks = scheme.per_row
            length = scheme.group_length(weight.shape[1])
            importance = _diagonal_blocks(hessian, length) if blocks else hessian.diagonal()
            found = "hessian" if blocks else "mse"

        def piece(
            rows: slice,
            weight: Tensor = weight,
            name: str = name,
            found: str = found,
            importance: Tensor | None = importance,
            global_scale: float = global_scale,
        ) -> Rows:
            part, scheme = weight[rows], group.schemes[name]
            grid = find_grid(part, scheme, found, importance, global_scale)
            full = grid.columns(part.shape)
            codes = round_to(part, full.scales, full.zeros, scheme)
            delta = (codes - full.zeros) * full.scales - part
            return Rows(grid, codes, energy(delta, group.hessian), energy(part, group.hessian))

        solved[name] = solve_rows(name, weight, group, piece, pool, global_scale)
    return solved


def _diagonal_blocks(hessian: Tensor, length: int) -> Tensor:
    """The groups' own blocks `[groups, length, length]` of H."""
    return torch.stack([hessian[i : i + length, i : i + length] for i in range(0, len(hessian), length)])
