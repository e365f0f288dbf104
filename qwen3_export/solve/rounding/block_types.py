"""Grids of ggml's block types, for solvers that work on scales and zero points.

    weight = code · scale + offset = (code − zero) · scale        zero = middle − offset / scale

Where a type has mins, zero points are not integers. For a codebook, codes are its values and the zero point is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, block_specs
from qwen3_export.model.table import to_numpy

# Stands in for a scale of zero: any code times it is almost zero.
_NO_SCALE = 1e-30


def middle_code(scheme: QuantScheme) -> float:
    """The code of a block type that stands for zero; 0 for codebooks."""
    block = scheme.block_type
    return 0.0 if block is None or block.has_mins or block.values is not None else float(1 << (block.num_bits - 1))


def search_blocks(
    weight: Tensor, scheme: QuantScheme, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, NDArray]]:
    """Scales, zero points and stored arrays of a weight `[rows, in]`.

    The search weighs each column's errors by its `importance` `[in]`.
    """
    from qwen3_export import ggml

    ggml.import_loops()
    weighed = None if importance is None else importance.float().cpu().numpy()
    tensor = ggml.round_rows("", to_numpy(weight.cpu()), scheme, weighed, quick=True).tensor
    fields = {key: getattr(tensor, key) for key in block_specs(scheme, tensor.shape)}
    return *grid_of_fields(fields, scheme, weight.device), fields


def grid_of_fields(fields: dict[str, Any], scheme: QuantScheme, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scales and zero points `[rows, groups]` of the stored arrays of a block type."""
    rows, groups = fields["scales"].shape
    block = scheme.block_type
    assert block is not None
    shape = (rows, groups * block.group)
    tensor = QuantizedTensor("", shape, scheme, np.broadcast_to(np.uint8(0), shape), **fields)
    scales = torch.from_numpy(tensor.scales32.astype(np.float32)).to(device)
    # In a group whose scale is zero every code stands for the offset alone.
    scales = torch.where(scales == 0, _NO_SCALE, scales)
    zeros = torch.full_like(scales, middle_code(scheme))
    if (offsets := tensor.offsets32) is not None:
        zeros -= torch.from_numpy(offsets).to(device) / scales
    return scales, zeros


def nearest_code(units: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """The nearest code of a block type, or nearest value of its codebook."""
    assert scheme.block_type is not None
    if scheme.block_type.values is None:
        return units.add_(zeros).round_().clamp_(0, scheme.max_code)
    values = torch.tensor(scheme.block_type.values, dtype=torch.float32, device=units.device)
    return values[torch.bucketize(units, (values[1:] + values[:-1]) / 2)]
