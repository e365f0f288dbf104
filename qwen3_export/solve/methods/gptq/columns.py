"""One block of columns: GPTQ's rounding, scale search and coordinate descent.

Everything is `[columns, rows]` in solving order, so that the innermost loops work on contiguous memory. Integer codes
and codebooks use the compiled loops of `gptq.column_kernels`, floats use torch. A test bounds the difference of their
results. The compiled loops run on the CPU, also where a GPU has the tensors: every column waits for the one before it,
and a GPU would be given thousands of tasks that are too small for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.rounding.grid import round_to


def round_block(
    rest: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """GPTQ's recursion over a block `[n, rows]` with its part of U `[n, n]`.

    Returns codes and errors e.
    """
    if _is_compiled(scheme):
        from qwen3_export.solve.methods.gptq import column_kernels

        codes, errors = torch.empty(rest.shape), torch.empty(rest.shape)
        column_kernels.round_block(*_arrays(rest, scales, zeros, upper), _codes(scheme), codes.numpy(), errors.numpy())
        return codes.to(rest.device), errors.to(rest.device)
    codes, errors, rest = torch.empty_like(rest), torch.empty_like(rest), rest.clone()
    for j, pivot in enumerate(upper.diagonal().tolist()):
        codes[j] = round_to(rest[j], scales[j], zeros[j], scheme)
        errors[j] = (rest[j] - (codes[j] - zeros[j]) * scales[j]) / pivot
        rest[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors


def search_block(
    part: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor]:
    """`round_block` of one group with every candidate scale and zero point `[candidates, rows]`.

    Returns codes and errors of each row's best candidate, the first with the least Σ e², and its number.
    """
    if _is_compiled(scheme):
        from qwen3_export.solve.methods.gptq import column_kernels

        codes, errors = torch.empty(part.shape), torch.empty(part.shape)
        chosen = column_kernels.search_block(
            *_arrays(part, scales, zeros, upper), _codes(scheme), codes.numpy(), errors.numpy()
        )
        return codes.to(part.device), errors.to(part.device), torch.from_numpy(chosen).to(part.device)
    tries, rows = scales.shape
    wide = part.repeat(1, tries)
    each = [values.reshape(-1).expand(len(part), -1) for values in (scales, zeros)]
    codes, errors = round_block(wide, each[0], each[1], upper, scheme)
    best = errors.square().sum(0).reshape(tries, rows).argmin(0)
    taken = best * rows + torch.arange(rows, device=part.device)
    return codes[:, taken], errors[:, taken], best


def descend_block(
    values: Tensor, scales: Tensor, zeros: Tensor, block: Tensor, slopes: Tensor, codes: Tensor, scheme: QuantScheme
) -> Tensor:
    """Set each code of a block to its minimiser given all others.

    `block` `[n, n]` is the block's part of H, `values` are the present weights, `slopes` their gradient. Changes
    `codes` `[n, rows]` and returns the steps of the values.
    """
    if _is_compiled(scheme):
        from qwen3_export.solve.methods.gptq import column_kernels

        found, steps = codes.cpu(), torch.empty(values.shape)
        arrays = _arrays(values, scales, zeros, block)
        column_kernels.descend_block(*arrays, _codes(scheme), *_arrays(slopes), found.numpy(), steps.numpy())
        if found is not codes:
            codes.copy_(found)
        return steps.to(values.device)
    steps, slopes = torch.empty_like(values), slopes.clone()
    for j, pivot in enumerate(block.diagonal().tolist()):
        code = round_to(values[j] - slopes[j] / pivot, scales[j], zeros[j], scheme)
        steps[j] = (code - codes[j]) * scales[j]
        codes[j] = code
        slopes.addr_(block[:, j], steps[j])
    return steps


def multiply(left: Tensor, right: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """`left @ right` in the given type.

    16 bits are precise enough: their rounding errors are a hundredth of those that 8-bit codes leave.
    """
    return left.to(matmul_dtype) @ right.to(matmul_dtype)


def _is_compiled(scheme: QuantScheme) -> bool:
    return scheme.type == "int" or scheme.block_type is not None


def _arrays(*tensors: Tensor) -> list[Any]:
    return [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in tensors]


def _codes(scheme: QuantScheme) -> Any:
    """What the compiled loops round to."""
    if scheme.block_type is None or scheme.block_type.values is None:
        return np.float32(scheme.max_code)
    numbers = np.array(scheme.block_type.values, np.float32)
    return numbers, (numbers[1:] + numbers[:-1]) / 2
