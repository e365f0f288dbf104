"""The upper Cholesky factor of the inverse Hessian, which GPTQ's recursion uses.

    H⁻¹ = Uᵀ U      by   H = R Rᵀ, R upper triangular   (a Cholesky factor, rows and columns reversed)
                         U = R⁻¹

One factorisation and one triangular inverse, whose strips of columns are computed in parallel, are half of the work of
inverting H and factorising the inverse, and lose less precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import Workers

_STRIP = 512


@dataclass(frozen=True)
class Factor:
    """The order of the columns, U, and the damped Hessian.

    Both matrices `[in, in]` are in that order.
    """

    order: Tensor
    upper: Tensor
    damped: Tensor


def damping(diagonal: Tensor, percdamp: float) -> Tensor:
    """The numbers added to the diagonal; 1 where no input ever arrived."""
    return torch.where(diagonal == 0, torch.ones_like(diagonal), percdamp * diagonal.mean())


def damped(hessian: Tensor, percdamp: float) -> Tensor:
    """H + λI."""
    found = hessian.clone()
    found.diagonal().add_(damping(hessian.diagonal(), percdamp))
    return found


def cholesky_in_place(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, which it overwrites.

    None for one that is not positive definite. The widest linears' matrices take gigabytes, so there is no copy.
    """
    # LAPACK works on columns. A symmetric matrix is its own transpose, so that nothing needs to be moved.
    columns, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return None if failed else columns


def factorise(
    hessian: Tensor, percdamp: float, act_order: bool, name: str, order: Tensor | None = None,
    pool: Workers | None = None,
) -> Factor:  # fmt: skip
    """Order the columns, damp and factorise the Hessian, in fp32 or if needed fp64.

    `order` gives the order of columns; without it `act_order` decides. A column that no input ever reached gets a unit
    diagonal: it is rounded and compensates nothing. Raises RecipeError, with the `name` of the linear, for a Hessian
    that is not positive definite.
    """
    diagonal = hessian.diagonal().clone()
    if order is None and act_order:
        order = diagonal.argsort(descending=True, stable=True)
    elif order is None:
        order = torch.arange(len(diagonal), device=hessian.device)
    # H is symmetric, so its columns are picked as rows, which are contiguous in memory.
    ordered = _pick(_pick(hessian, order, pool).T.contiguous(), order, pool)
    ordered.diagonal().add_(damping(diagonal, percdamp)[order])
    for dtype in (torch.float32, torch.float64):
        lower = cholesky_in_place(ordered.to(dtype).flip(0, 1))
        if lower is not None:
            reversed_, lower = lower.flip(0, 1), None
            upper = _inverse(reversed_, pool)
            if torch.isfinite(upper.sum()):
                return Factor(order, upper, ordered)
    raise RecipeError(
        f"{name}: the Hessian of its inputs is not positive definite with percdamp {percdamp}",
        "use more calibration text, or a larger percdamp in the recipe's options",
    )


def _inverse(upper: Tensor, pool: Workers | None) -> Tensor:
    """Inverse of an upper triangular matrix in fp32, without computing its zeros."""
    size = len(upper)
    found = torch.zeros(size, size, device=upper.device)

    def strip(begin: int) -> None:
        end = min(begin + _STRIP, size)
        unit = torch.zeros(end, end - begin, dtype=upper.dtype, device=upper.device)
        unit[begin:].fill_diagonal_(1.0)
        found[:end, begin:end] = torch.linalg.solve_triangular(upper[:end, :end], unit, upper=True)

    # The longest strips first, so that the threads finish at the same time.
    _each(strip, range(0, size, _STRIP)[::-1], pool)
    return found


def _pick(matrix: Tensor, rows: Tensor, pool: Workers | None) -> Tensor:
    """`matrix[rows]`, copied some rows at a time."""
    found = torch.empty_like(matrix)

    def part(begin: int) -> None:
        torch.index_select(matrix, 0, rows[begin : begin + _STRIP], out=found[begin : begin + _STRIP])

    _each(part, range(0, len(rows), _STRIP), pool)
    return found


def _each(function: Callable[[int], None], begins: range, pool: Workers | None) -> None:
    if pool is not None:
        pool.map(function, begins)
        return
    for begin in begins:
        function(begin)
