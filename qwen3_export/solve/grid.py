"""The integer grid: which scale and zero point a group of weights gets, and rounding onto it.

A scale is rounded to its storage precision here, before any code is chosen: what is optimised is
what is shipped. bf16 scales are also kept in fp16's normal range, so that bf16, fp16 and fp32
runtimes multiply by the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_export.core.recipe import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE
from qwen3_export.errors import RecipeError

TORCH_SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEARCHES = ("absmax", "mse")
_SHRINK = [1.0 - 0.025 * step for step in range(-2, 22)]


@dataclass(frozen=True)
class Grid:
    """Scales and zero points `[out, groups]` in fp32, scales exact in the scheme's storage type."""

    scheme: QuantScheme
    scales: Tensor
    zeros: Tensor

    def columns(self, in_features: int) -> Grid:
        """The same grid with one entry per input column, `[out, in]`."""
        length = self.scheme.group_length(in_features)
        return Grid(self.scheme, self.scales.repeat_interleave(length, 1), self.zeros.repeat_interleave(length, 1))


def round_scale(scale: Tensor, dtype: str) -> Tensor:
    """To storage precision and range, back in fp32."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(TORCH_SCALES[dtype]).float()


def round_to(weight: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """Codes in fp32: `clamp(round(w / s) + z, 0, max_code)`."""
    return torch.clamp(torch.round(weight / scales) + zeros, 0, max_code)


def find_grid(weight: Tensor, scheme: QuantScheme, search: str, importance: Tensor | None = None) -> Grid:
    """Scales and zeros of a weight `[out, in]`.

    `absmax` covers the whole range; `mse` tries 24 shrunken ranges and keeps, per group, the one
    with the least squared error, each column weighted by `importance` `[in]` (the Hessian's
    diagonal) when that is given. Raises RecipeError for an unknown search.
    """
    if search not in SEARCHES:
        raise RecipeError(f"scale_search is {search!r}; one of {list(SEARCHES)} was expected")
    groups = weight.reshape(weight.shape[0], scheme.num_groups(weight.shape[1]), -1)
    grid = range_grid(groups, scheme, 1.0)
    if search == "absmax":
        return Grid(scheme, *grid)
    columns = None if importance is None else importance.reshape(groups.shape[1:])
    best, error = list(grid), _error(groups, *grid, scheme, columns)
    for shrink in _SHRINK:
        candidate = range_grid(groups, scheme, shrink)
        candidate_error = _error(groups, *candidate, scheme, columns)
        better = candidate_error < error
        error = torch.where(better, candidate_error, error)
        best = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]
    return Grid(scheme, best[0], best[1])


def range_grid(groups: Tensor, scheme: QuantScheme, shrink: float) -> tuple[Tensor, Tensor]:
    """Scales and zeros `[out, groups]` that cover `shrink` times each group's range."""
    if scheme.symmetric:
        scale = round_scale(groups.abs().amax(-1) * (shrink * 2 / scheme.max_code), scheme.scale_dtype)
        return scale, torch.full_like(scale, scheme.midpoint)
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    scale = round_scale((high - low) / scheme.max_code, scheme.scale_dtype)
    return scale, torch.clamp(torch.round(-low / scale), 0, scheme.max_code)


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme, importance: Tensor | None) -> Tensor:
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    delta = (round_to(groups, scales, zeros, scheme.max_code) - zeros).mul_(scales).sub_(groups).square_()
    return delta.sum(-1) if importance is None else (delta * importance).sum(-1)
