"""Refitting a K-quant's scales and mins: never worse, near the best pair of integers, and in the type's range."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3_export.core.scheme import GGML_TYPES, scheme_of_type
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.solve.methods.gptq.block_refit import refit_blocks
from qwen3_export.solve.methods.gptq.refit_kernels import refit_block
from qwen3_export.solve.rounding.grid import Grid, block_grid, round_onto

SUPER = sorted(name for name in GGML_TYPES if (block := scheme_of_type(name).block_type) is not None and block.is_super)


def hessian(size: int) -> Tensor:
    random = torch.Generator().manual_seed(5)
    mixing = torch.randn(size, size, generator=random) / size**0.5 + torch.eye(size)
    x = torch.randn(4 * size, size, generator=random) @ mixing * torch.exp(torch.randn(size, generator=random))
    return x.T @ x / len(x) + 0.01 * torch.eye(size)


def weights(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(6))


def errors(weight: Tensor, codes: Tensor, grid: Grid, matrix: Tensor) -> Tensor:
    """What each row's error costs, of the numbers that are stored, dequantized as libggml does."""
    bits = codes if grid.scheme.block_type.values is None else values_to_codes(codes, grid)
    tensor = QuantizedTensor("w", tuple(weight.shape), grid.scheme, bits.numpy().astype(np.uint8), **grid.fields)
    delta = torch.from_numpy(dequantize(tensor)).double() - weight
    return ((delta @ matrix.double()) * delta).sum(1)


def values_to_codes(codes: Tensor, grid: Grid) -> Tensor:
    return torch.searchsorted(torch.tensor(grid.scheme.block_type.values, dtype=codes.dtype), codes)


@pytest.mark.parametrize("name", SUPER)
def test_no_row_gets_worse_and_all_together_get_better(name: str) -> None:
    scheme, weight, matrix = scheme_of_type(name), weights(12, 512), hessian(512)
    grid = block_grid(weight, scheme, matrix.diagonal())
    codes, _ = round_onto(weight, grid)
    before = errors(weight, codes, grid, matrix)
    fitted = refit_blocks(weight, codes, grid, matrix)
    after = errors(weight, codes, fitted, matrix)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.98 * float(before.sum())
    assert {key: array.dtype for key, array in fitted.fields.items()} == {k: a.dtype for k, a in grid.fields.items()}
    again = refit_blocks(weight, codes, fitted, matrix)
    assert float(errors(weight, codes, again, matrix).sum()) <= float(after.sum()) * (1 + 1e-4)


def test_a_groups_pair_of_integers_is_nearly_the_best_of_all() -> None:
    scheme, weight, matrix = scheme_of_type("q2_k"), weights(8, 256), hessian(256)
    grid = block_grid(weight, scheme)
    codes, _ = round_onto(weight, grid)
    block = scheme.block_type
    assert block is not None
    scales, mins = (grid.fields[key].astype(np.float32) for key in ("scales", "mins"))
    above = np.stack([grid.fields[key][:, 0].astype(np.float32) for key in ("super_scales", "super_mins")], -1)
    full = grid.columns(weight.shape)
    delta = ((codes - full.zeros) * full.scales - weight).double()
    old, d, m = (scales.copy(), mins.copy()), above[:, 0].copy(), above[:, 1].copy()
    slopes = (delta @ matrix.double()).float().numpy()
    # The first group moves first, while all others are where they were.
    limits = np.array([*block.scale_range, block.max_min], np.float32)
    steps = np.empty((8, 256), np.float32)
    refit_block(matrix.numpy(), codes.numpy(), slopes, scales, mins, above, limits, True, steps)
    for row in range(8):

        def cost(scale: float, least: float, row: int = row) -> float:
            moved = delta[row].clone()
            moved[:16] += d[row] * (scale - old[0][row, 0]) * codes[row, :16] - m[row] * (least - old[1][row, 0])
            return float(moved @ matrix.double() @ moved)

        best = min(cost(*pair) for pair in product(range(16), range(16)))
        start, found = cost(old[0][row, 0], old[1][row, 0]), cost(scales[row, 0], mins[row, 0])
        # Of what the best pair gains, nearly all.
        assert start - found >= 0.9 * (start - best)


def test_zero_blocks_stay_zero_and_finite() -> None:
    for name in SUPER:
        scheme, weight, matrix = scheme_of_type(name), weights(4, 512), hessian(512)
        weight[1], weight[2, :256] = 0, 0
        grid = block_grid(weight, scheme)
        codes, _ = round_onto(weight, grid)
        fitted = refit_blocks(weight, codes, grid, matrix)
        after = errors(weight, codes, fitted, matrix)
        assert bool(torch.isfinite(after).all())
        assert float(after[1]) == pytest.approx(0.0, abs=1e-6)
