"""GPTQ on ggml's block types: scales and mins, then codes, then descent over both.

    for each block of 256 columns (32 for the simple types), by falling sum of diag H:
        grid    the importance-weighted search of `qwen3_export.ggml`, on the weights as the solve has left them;
                a column's importance is 1 / U_jj², the cost of an error there after later columns compensate
        codes   GPTQ's recursion on that grid; later blocks compensate the errors that are left
    for each pass of descent:
        scales and mins (`block_refit`), from the second pass on
        codes

A block's weights are `code · scale + offset`. Offsets are subtracted from the weights before the columns are
rounded, so that the loops for integers can be used: W − O is rounded onto code · scale, with the same error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.methods.gptq.block_refit import refit_blocks
from qwen3_export.solve.methods.gptq.cholesky import Factor
from qwen3_export.solve.methods.gptq.columns import multiply, round_block
from qwen3_export.solve.methods.gptq.refine import descend
from qwen3_export.solve.rounding.grid import Grid, block_grid


def block_columns(scheme: QuantScheme) -> int:
    """Number of columns in a block, which are solved with one grid."""
    assert scheme.block_type is not None
    return scheme.block_type.block


def has_super_scales(scheme: QuantScheme) -> bool:
    """Whether the type's scales are integers under a super scale, which can be refitted."""
    return scheme.block_type is not None and scheme.block_type.is_super


def solve_block_type(
    weight: Tensor, scheme: QuantScheme, factor: Factor, descents: int, hessian: Tensor | None,
    matmul_dtype: torch.dtype = torch.float32,
) -> tuple[Grid, Tensor]:  # fmt: skip
    """Grid and codes of a weight `[out, in]`.

    `factor.order` keeps the columns of a block together. `hessian`, damped and in the columns' own order, is needed
    for more than one pass of descent.
    """
    length, order = block_columns(scheme), factor.order
    rest, codes = weight.T[order].contiguous(), torch.empty_like(weight.T)
    importance = factor.upper.diagonal().square().reciprocal()
    grids: dict[int, Grid] = {}
    for begin in range(0, len(rest), length):
        own = slice(begin, begin + length)
        inside = order[own] % length
        natural = torch.empty_like(inside)
        natural[inside] = torch.arange(length, device=inside.device)
        grid = block_grid(rest[own][natural].T.contiguous(), scheme, importance[own][natural])
        plain, offsets = grid.without_offsets(), grid.offsets_of_columns(length)
        columns = plain.columns((weight.shape[0], length))
        shifted = rest[own] - offsets[:, inside].T
        scales, zeros = columns.scales.T[inside].contiguous(), columns.zeros.T[inside].contiguous()
        codes[order[own]], errors = round_block(shifted, scales, zeros, factor.upper[own, own], scheme)
        rest[own.stop :].sub_(multiply(factor.upper[own, own.stop :].T, errors, matmul_dtype))
        grids[int(order[begin]) // length] = grid
    grid = Grid.side_by_side([grids[block] for block in sorted(grids)])
    found = codes.T.contiguous()
    shifted = weight - grid.offsets_of_columns(weight.shape[1])
    for turn in range(descents):
        if turn > 0 and has_super_scales(scheme):
            assert hessian is not None
            grid = refit_blocks(weight, found, grid, hessian, matmul_dtype)
            shifted = weight - grid.offsets_of_columns(weight.shape[1])
        found = descend(shifted, found, grid.without_offsets(), factor.damped, order, matmul_dtype)
    return grid, found
