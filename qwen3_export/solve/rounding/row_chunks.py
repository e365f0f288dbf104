"""A weight in chunks of output rows: cut, solved, joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import E2M1, SCALE_TYPES, SMALLEST_SCALE, QuantizedTensor
from qwen3_export.errors import RecipeError
from qwen3_export.model.activations import LARGEST_E2M1, LARGEST_E4M3, largest_unit
from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.chunk_sizes import ROWS_AT_ONCE
from qwen3_export.solve.method import LinearGroup, SolvedWeight, not_finite, ratio
from qwen3_export.solve.rounding.grid import TORCH_SCALES, Grid

_STRIP = 256


def row_chunks(weight: Tensor, scheme: QuantScheme, at_once: int = ROWS_AT_ONCE) -> list[slice]:
    """Slices of output rows, never through rows that share a scale.

    They do not depend on the number of threads.
    """
    out_rows, together = weight.shape[0], scheme.rows_per_scale(weight.shape[0])
    step = max(at_once // together, 1) * together
    return [slice(begin, min(begin + step, out_rows)) for begin in range(0, out_rows, step)]


def check_finite(name: str, weight: Tensor) -> None:
    """Raise RecipeError when a weight holds NaN or infinity."""
    # Minimum and maximum are NaN as soon as one weight is, and take a tenth of the time of testing every weight.
    if not all(torch.isfinite(bound) for bound in torch.aminmax(weight)):
        raise not_finite(name)


@dataclass(frozen=True)
class SolvedRows:
    """Some solved output rows: grid, codes in fp32 or bytes, squared error.

    `total` is the weighted sum of squared weights that the error is divided by.
    """

    grid: Grid
    codes: Tensor
    error: float
    total: float


def solve_rows(
    name: str, weight: Tensor, group: LinearGroup, solve: Callable[[slice], SolvedRows], pool: Workers,
    global_scale: float = 1.0, cut: Sequence[slice] | None = None,
) -> SolvedWeight:  # fmt: skip
    """Solve a weight `[out, in]` in chunks of output rows `cut`, and join them."""
    scheme = group.schemes[name]

    def piece_of(out_rows: slice) -> SolvedRows:
        solved = solve(out_rows)
        return replace(solved, codes=_code_bytes(solved.codes, scheme))

    pieces = _solve_all(piece_of, cut or row_chunks(weight, scheme), scheme, pool)
    codes = torch.cat([piece.codes for piece in pieces]).numpy()
    error = ratio(name, sum(piece.error for piece in pieces), sum(piece.total for piece in pieces))
    if scheme.block_type is not None:
        fields: dict[str, Any] = dict(Grid.below([piece.grid for piece in pieces]).fields)
        return SolvedWeight(QuantizedTensor(name, codes.shape, scheme, codes, **fields), error)
    scales = torch.cat([piece.grid.scales for piece in pieces])
    if scheme.scale_dtype == "e4m3":
        scales = scales * global_scale
    stored = scales.to(TORCH_SCALES[scheme.scale_dtype]).cpu()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.cat([piece.grid.zeros for piece in pieces]).to(torch.uint8).cpu().numpy()
    tensor = QuantizedTensor(
        name,
        codes.shape,
        scheme,
        codes,
        _to_numpy(stored),
        zeros,
        global_scale=global_scale if scheme.scale_dtype == "e4m3" else None,
        input_scale=_input_scale(group.input_peak, scheme) if scheme.has_input_scale else None,
    )
    return SolvedWeight(tensor, error)


def _solve_all(
    solve: Callable[[slice], SolvedRows], cut: Sequence[slice], scheme: QuantScheme, pool: Workers
) -> list[SolvedRows]:
    """All chunks in their order, on a cluster some of them by other workers."""
    found: dict[int, SolvedRows] = {}

    def work(places: Sequence[int]) -> None:
        found.update(zip(places, pool.map(solve, [cut[place] for place in places]), strict=True))

    def dump(place: int) -> Parts:
        rows, grid = found[place], found[place].grid
        numbers = {"error": rows.error, "total": rows.total}
        return {"codes": rows.codes, "scales": grid.scales, "zeros": grid.zeros, "fields": dict(grid.fields), **numbers}

    def load(place: int, parts: Parts) -> None:
        grid = Grid(scheme, parts["scales"], parts["zeros"], parts["fields"])
        found[place] = SolvedRows(grid, parts["codes"], parts["error"], parts["total"])

    pool.share("rows", range(len(cut)), work, dump, load)
    return [found[place] for place in range(len(cut))]


def _code_bytes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes as numpy arrays of one byte each."""
    if codes.dtype == torch.uint8:
        return codes
    block = scheme.block_type
    if block is not None and block.values is not None:
        values = torch.tensor(block.values, dtype=torch.float32, device=codes.device)
        return torch.bucketize(codes, values).to(torch.uint8).cpu()
    if scheme.type != "float":
        # numpy converts several times as fast as torch.
        return torch.from_numpy(codes.cpu().numpy().astype(np.uint8))
    if scheme.num_bits == 8:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8).cpu()
    sizes = torch.from_numpy(E2M1[:8]).to(codes.device)
    return (torch.bucketize(codes.abs(), sizes) + 8 * torch.signbit(codes)).to(torch.uint8).cpu()


def _input_scale(peak: float, scheme: QuantScheme) -> float:
    """The scale of a linear's inputs; 1 where no token arrived.

    A static one is bf16. NVFP4's brings the largest scale of 16 inputs to the end of E4M3, and is rounded up to four
    significant bits: its product with an E4M3 number is exact in fp16 and bf16.
    """
    if scheme.num_bits == 4:
        mantissa, exponent = math.frexp(peak / LARGEST_E4M3 / LARGEST_E2M1)
        return max(math.ldexp(math.ceil(mantissa * 16) / 16, exponent), SMALLEST_SCALE) if peak > 0 else 1.0
    scale = torch.tensor(peak / largest_unit(scheme)).to(torch.bfloat16)
    return float(scale) if scale > 0 else 1.0


def _to_numpy(tensor: Tensor) -> Any:
    """A numpy array with the same bits; bf16 and float8 types come from ml_dtypes."""
    for name, dtype in TORCH_SCALES.items():
        if tensor.dtype == dtype and name not in ("fp16", "fp32"):
            bits = torch.int16 if tensor.element_size() == 2 else torch.uint8
            return tensor.view(bits).numpy().view(SCALE_TYPES[name])
    return tensor.numpy()


def check_inputs(group: LinearGroup) -> None:
    """Raise RecipeError when the group's inputs hold NaN or infinity."""
    # The sum is not finite as soon as one element is not, and takes a tenth of the time of testing every element.
    if group.hessian is not None and not torch.isfinite(group.hessian.sum(dtype=torch.float64)):
        first = next(iter(group.weights))
        raise RecipeError(f"{first}: its inputs hold NaN or infinity", "the checkpoint is damaged, or its config wrong")


def quadratic_form(matrix: Tensor, hessian: Tensor | None, matmul_dtype: torch.dtype = torch.float32) -> float:
    """tr(M H Mᵀ), or tr(M Mᵀ) without inputs, summed in fp64.

    M H is multiplied in `matmul_dtype`, whose rounding errors average out. H is symmetric, so only one of its halves
    beside the diagonal blocks is multiplied, and counts twice.
    """
    if hessian is None:
        return float(matrix.square().sum(dtype=torch.float64))
    total = 0.0
    for begin in range(0, len(hessian), _STRIP):
        own = slice(begin, min(begin + _STRIP, len(hessian)))
        through = (matrix[:, own].to(matmul_dtype) @ hessian[own, begin:].to(matmul_dtype)) * matrix[:, begin:]
        inside = through[:, : own.stop - begin].sum(dtype=torch.float64)
        total += 2 * float(through.sum(dtype=torch.float64)) - float(inside)
    return total
