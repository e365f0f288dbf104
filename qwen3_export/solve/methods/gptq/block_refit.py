"""Refit of a K-quant's scales and mins to chosen codes.

Descent on GPTQ's objective over the numbers that are stored, block of 256 columns after block:

    per group    the integers of its scale and min: the exact minimum for both, rounded, and its neighbours
    per block    the two fp16 numbers above them: the exact minimum, rounded

A step is taken only if it lowers the error, so the objective never rises. Codes stay; the next pass of descent takes
them up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.model.table import to_numpy
from qwen3_export.solve.methods.gptq.columns import multiply
from qwen3_export.solve.rounding.block_types import grid_of_fields, middle_code
from qwen3_export.solve.rounding.grid import Grid


def refit_blocks(
    weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, matmul_dtype: torch.dtype = torch.float32
) -> Grid:
    """The grid of a weight `[rows, in]` whose error with these `codes` is less.

    `hessian` is damped, in the columns' own order. The grid's type has super scales.
    """
    from qwen3_export.solve.methods.gptq.refit_kernels import refit_block

    block = grid.scheme.block_type
    assert block is not None
    full = grid.columns(weight.shape)
    errors = (codes - full.zeros) * full.scales - weight
    slopes = multiply(errors, hessian, matmul_dtype).float()
    plain = codes - middle_code(grid.scheme)
    # Without mins there is one that cannot be above zero, under a super min of zero.
    mins = grid.fields.get("mins", np.zeros(grid.fields["scales"].shape, np.uint8)).astype(np.float32)
    scales, above = grid.fields["scales"].astype(np.float32), _above(grid.fields)
    limits = np.array([*block.scale_range, block.max_min], np.float32)
    per, steps = block.block // block.group, torch.empty(len(weight), block.block)
    for number in range(above.shape[1]):
        own, groups = (slice(number * size, (number + 1) * size) for size in (block.block, per))
        arrays = [np.ascontiguousarray(to_numpy(m[:, own].cpu())) for m in (hessian[own], plain, slopes)]
        state = [np.ascontiguousarray(array[:, place]) for array, place in ((scales, groups), (mins, groups))]
        now = np.ascontiguousarray(above[:, number])
        refit_block(*arrays, *state, now, limits, block.has_mins, steps.numpy())
        scales[:, groups], mins[:, groups], above[:, number] = *state, now
        moved = steps.to(weight.device)
        slopes[:, own.stop :] += multiply(moved, hessian[own, own.stop :], matmul_dtype)
    found = {"scales": scales, "mins": mins, "super_scales": above[..., 0], "super_mins": above[..., 1]}
    fields = {key: np.ascontiguousarray(found[key].astype(array.dtype)) for key, array in grid.fields.items()}
    return Grid(grid.scheme, *grid_of_fields(fields, grid.scheme, weight.device), fields)


def _above(fields: Mapping[str, NDArray]) -> NDArray[np.float32]:
    """The two numbers above each block, `[rows, blocks, 2]`.

    The second is 0 where the type has no mins.
    """
    scales = fields["super_scales"].astype(np.float32)
    mins = fields["super_mins"].astype(np.float32) if "super_mins" in fields else np.zeros_like(scales)
    return np.stack([scales, mins], -1)
