"""Rounding to nearest with torch: floats, and errors weighed by inputs.

`solve.methods.rtn` uses it, and methods that use inputs fall back to it. Integer codes without inputs are rounded by
`blocks.rtn_without_torch`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qwen3_export.model.table import to_numpy
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup, SolvedWeight
from qwen3_export.solve.rounding.grid import Grid, find_grid, round_onto, shared_global_scale
from qwen3_export.solve.rounding.row_chunks import (
    SolvedRows,
    check_finite,
    check_inputs,
    quadratic_form,
    row_chunks,
    solve_rows,
)
from qwen3_export.solve.rounding.scale_search import ROUNDED_AT_ONCE, is_one_pass, round_groups


def round_group(group: LinearGroup, search: str, pool: Workers) -> dict[str, SolvedWeight]:
    """Search each weight's grid and round onto it, in pieces of rows."""
    check_inputs(group)
    for name, weight in group.weights.items():
        check_finite(name, weight)
    weights = list(group.weights.values())
    found = {}
    for name, weight in group.weights.items():
        unit = shared_global_scale(weights, group.schemes[name])
        pieces = row_chunks(weight, group.schemes[name], max(ROUNDED_AT_ONCE // weight.shape[1], 1))
        found[name] = solve_rows(name, weight, group, partial(_round, name, group, search, unit), pool, unit, pieces)
    return found


def _round(name: str, group: LinearGroup, search: str, unit: float, out_rows: slice) -> SolvedRows:
    """Grid and codes of some rows, in one pass unless a Hessian weighs errors."""
    scheme, part, hessian = group.schemes[name], group.weights[name][out_rows], group.hessian
    length = scheme.group_length(part.shape[1])
    if hessian is None and is_one_pass(scheme, part.shape[1], part.device.type):
        *found, missed, whole = round_groups(to_numpy(part), length, scheme, search != "absmax")
        scales, zeros, integers = map(torch.from_numpy, found)
        return SolvedRows(Grid(scheme, scales, zeros), integers, missed, whole)
    importance = None
    if search == "hessian" and hessian is not None:
        importance = _diagonal_blocks(hessian, length) if scheme.per_row else hessian.diagonal()
        search = "hessian" if scheme.per_row else "mse"
    grid = find_grid(part, scheme, search, importance, unit)
    part = part.float()
    codes, delta = round_onto(part, grid)
    return SolvedRows(grid, codes, quadratic_form(delta, hessian), quadratic_form(part, hessian))


def _diagonal_blocks(hessian: Tensor, length: int) -> Tensor:
    """The groups' own blocks `[groups, length, length]` of H."""
    return torch.stack([hessian[i : i + length, i : i + length] for i in range(0, len(hessian), length)])
