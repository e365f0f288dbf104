"""One block of columns: GPTQ's rounding, scale search and coordinate descent.

Everything is `[columns, rows]` in solving order, so that the innermost loops of `gptq.column_kernels` work on
contiguous memory. They run on the CPU, also where a GPU has the tensors: every column waits for the one before it, and
a GPU would be given thousands of tasks that are too small for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.activations import LARGEST_E2M1, LARGEST_E4M3


def round_block(
    rest: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """GPTQ's recursion over a block `[n, rows]` with its part of U `[n, n]`.

    Returns codes and errors e.
    """
    from qwen3_export.solve.methods.gptq import column_kernels

    codes, errors = torch.empty(rest.shape), torch.empty(rest.shape)
    column_kernels.round_block(*_arrays(rest, scales, zeros, upper), _codes(scheme), codes.numpy(), errors.numpy())
    return codes.to(rest.device), errors.to(rest.device)


def search_block(
    part: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor]:
    """`round_block` of one group with every candidate scale and zero point `[candidates, rows]`.

    Returns codes and errors of each row's best candidate, the first with the least Σ e², and its number.
    """
    from qwen3_export.solve.methods.gptq import column_kernels

    codes, errors = torch.empty(part.shape), torch.empty(part.shape)
    arrays = _arrays(part, scales, zeros, upper)
    chosen = column_kernels.search_block(*arrays, _codes(scheme), codes.numpy(), errors.numpy())
    return codes.to(part.device), errors.to(part.device), torch.from_numpy(chosen).to(part.device)


def descend_block(
    values: Tensor, scales: Tensor, zeros: Tensor, block: Tensor, slopes: Tensor, codes: Tensor, scheme: QuantScheme
) -> Tensor:
    """Set each code of a block to its minimiser given all others.

    `block` `[n, n]` is the block's part of H, `values` are the present weights, `slopes` their gradient. Changes
    `codes` `[n, rows]` and returns the steps of the values.
    """
    from qwen3_export.solve.methods.gptq import column_kernels

    found, steps = codes.cpu(), torch.empty(values.shape)
    arrays = _arrays(values, scales, zeros, block)
    column_kernels.descend_block(*arrays, _codes(scheme), *_arrays(slopes), found.numpy(), steps.numpy())
    if found is not codes:
        codes.copy_(found)
    return steps.to(values.device)


def multiply(left: Tensor, right: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """`left @ right` in the given type.

    16 bits are precise enough: their rounding errors are a hundredth of those that 8-bit codes leave.
    """
    return left.to(matmul_dtype) @ right.to(matmul_dtype)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in tensors]


def _codes(scheme: QuantScheme) -> Any:
    """What the compiled loops round to: `column_kernels.Codes`."""
    if scheme.block_type is not None and scheme.block_type.values is not None:
        numbers = np.array(scheme.block_type.values, np.float32)
        return numbers, (numbers[1:] + numbers[:-1]) / 2
    if scheme.type == "float":
        e4m3, e2m1 = (LARGEST_E4M3, 2.0**-6, 2.0**-9, 20), (LARGEST_E2M1, 1.0, 0.5, 22)
        *sizes, lacks = e4m3 if scheme.num_bits == 8 else e2m1
        return (*map(np.float32, sizes), lacks)
    return np.float32(scheme.max_code)
