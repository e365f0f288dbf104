"""Round to nearest: code = clamp(round(w / s) + z), no calibration.

min over s, z of Σ (w − (code − z)·s)²   per group       scale_search: mse
s = 2·max|w| / (2^bits − 1)              per group       scale_search: absmax
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen3_export.model.workers import Workers
from qwen3_export.solve.grid import Grid, find_grid, round_to
from qwen3_export.solve.method import Group, Solved, assemble, check_finite, ratio, row_pieces

NEEDS_INPUTS = False


@dataclass(frozen=True)
class Options:
    """`scale_search`: `mse` tries shrunken ranges per group, `absmax` covers the whole range."""

    scale_search: str = "mse"


def needs_original(_options: Options) -> bool:
    """Rounding needs no inputs at all."""
    return False


def solve(group: Group, options: Options, pool: Workers) -> dict[str, Solved]:
    """Round every weight of the group; the error is relative to the weight's own energy."""
    solved = {}
    for name, weight in group.weights.items():
        check_finite(name, weight)
        scheme = group.schemes[name]

        def piece(rows: slice, weight: Tensor = weight, name: str = name) -> tuple[Grid, Tensor, float]:
            part = weight[rows]
            grid = find_grid(part, group.schemes[name], options.scale_search)
            full = grid.columns(part.shape[1])
            codes = round_to(part, full.scales, full.zeros, group.schemes[name].max_code)
            return grid, codes, float(((codes - full.zeros) * full.scales - part).double().square().sum())

        pieces = pool.map(piece, row_pieces(weight))
        tensor = assemble(name, [p[0] for p in pieces], [p[1] for p in pieces])
        error = ratio(name, sum(p[2] for p in pieces), float(weight.double().square().sum()))
        solved[name] = Solved(tensor, error)
        assert tensor.scheme == scheme
    return solved
