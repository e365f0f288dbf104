"""The grid of numbers that a weight may take, and rounding onto it.

Scales are rounded to their storage type before any code is chosen, so that solvers optimise exactly the numbers that
are shipped. bf16 scales of integer codes are also kept in fp16's normal range, so that bf16, fp16 and fp32 runtimes
multiply by the same number.

Solvers hold codes as fp32 numbers: integers 0 … max_code, or the values of E4M3 or E2M1 floats, whose zero point is 0.
For all of them `weight = (code - zero) * scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import LARGEST_SCALE, SMALLEST_SCALE
from qwen3_export.errors import RecipeError
from qwen3_export.model.activations import round_e2m1, round_e4m3
from qwen3_export.model.table import to_numpy
from qwen3_export.solve.rounding.block_types import middle_code, nearest_code, search_blocks
from qwen3_export.solve.rounding.scale_search import SEARCHES, SHRINKS, is_compiled, numbers_to_try, round_groups

TORCH_SCALES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
# Largest value of E2M1 and E4M3, by bits.
LARGEST_FLOAT = {4: 6.0, 8: 448.0}
# Weights that are rounded together.
_CACHED_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class Grid:
    """Scales and zero points `[rows, groups]` in fp32.

    The scales are exact in the scheme's storage type. For a block type of ggml, `fields` are the arrays that are
    stored, `[rows, …]`, and zero points are −offset / scale, which is not an integer where the type has mins.
    """

    scheme: QuantScheme
    scales: Tensor
    zeros: Tensor
    fields: Mapping[str, NDArray] = field(default_factory=dict)

    @staticmethod
    def below(grids: Sequence[Grid]) -> Grid:
        """The grid of several sets of rows, one below the other."""
        fields = {key: np.concatenate([grid.fields[key] for grid in grids]) for key in grids[0].fields}
        scales, zeros = (torch.cat([getattr(grid, key) for grid in grids]) for key in ("scales", "zeros"))
        return Grid(grids[0].scheme, scales, zeros, fields)

    @staticmethod
    def side_by_side(grids: Sequence[Grid]) -> Grid:
        """The grid of several sets of columns, one beside the other."""
        fields = {key: np.concatenate([grid.fields[key] for grid in grids], axis=1) for key in grids[0].fields}
        scales, zeros = (torch.cat([getattr(grid, key) for grid in grids], dim=1) for key in ("scales", "zeros"))
        return Grid(grids[0].scheme, scales, zeros, fields)

    def rows(self, chosen: slice) -> Grid:
        """The grid of some rows."""
        fields = {key: array[chosen] for key, array in self.fields.items()}
        return Grid(self.scheme, self.scales[chosen], self.zeros[chosen], fields)

    def without_offsets(self) -> Grid:
        """The grid for weights whose offsets were subtracted; its zero points are integers."""
        middle = middle_code(self.scheme)
        return Grid(self.scheme, self.scales, torch.full_like(self.zeros, middle), self.fields)

    def offsets_of_columns(self, count: int) -> Tensor:
        """The offset that a block type adds to every weight, `[rows, count]`."""
        offsets = (middle_code(self.scheme) - self.zeros) * self.scales
        return offsets.repeat_interleave(count // offsets.shape[1], 1)

    def columns(self, shape: Sequence[int]) -> Grid:
        """The same grid with one entry per weight, `[out, in]`."""
        tall, wide = self.scheme.rows_per_scale(shape[0]), self.scheme.group_length(shape[1])

        def spread(values: Tensor) -> Tensor:
            values = values.repeat_interleave(wide, 1)[:, : shape[1]]
            return values if tall == 1 else values.repeat_interleave(tall, 0)[: shape[0]]

        return Grid(self.scheme, spread(self.scales), spread(self.zeros), self.fields)


def round_scale(scale: Tensor, scheme: QuantScheme, global_scale: float = 1.0) -> Tensor:
    """A scale rounded to its storage type and range, in fp32.

    The number that is rounded is `scale * global_scale`, which differs from the scale for NVFP4 only.
    """
    dtype = scheme.scale_dtype
    if dtype == "e8m0":
        return torch.exp2(torch.log2(scale.clamp(min=2.0**-126)).round())
    if dtype == "e4m3":
        stored = (scale * global_scale).clamp(2.0**-9, LARGEST_FLOAT[8]).to(TORCH_SCALES[dtype])
        return stored.float() / global_scale
    smallest = SMALLEST_SCALE if scheme.type == "int" else 2.0**-100
    magnitude = scale.abs().clamp(smallest, LARGEST_SCALE)
    return torch.copysign(magnitude, scale).to(TORCH_SCALES[dtype]).float()


def round_to(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes in fp32, rounded to nearest.

    They are `clamp(round(w / s) + z, 0, max_code)`, or the nearest float of the scheme's type.
    """
    units = weight / scales
    if scheme.block_type is not None:
        return nearest_code(units, zeros, scheme)
    if scheme.type == "int":
        return units.round_().add_(zeros).clamp_(0, scheme.max_code)
    return round_e4m3(units) if scheme.num_bits == 8 else round_e2m1(units)


def round_onto(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes of a weight `[out, in]` in fp32, and every weight's rounding error."""
    if grid.scheme.per_row:
        cells, scales, zeros = cut(weight, grid.scheme), grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
    else:
        full = grid.columns(weight.shape)
        cells, scales, zeros = weight, full.scales, full.zeros
    codes = round_to(cells, scales, zeros, grid.scheme)
    delta = (codes - zeros).mul_(scales).sub_(cells)
    return codes.reshape(weight.shape), delta.reshape(weight.shape)


def shared_global_scale(weights: Sequence[Tensor], scheme: QuantScheme) -> float:
    """NVFP4's global scale, common to linears that a runtime fuses; else 1."""
    if scheme.scale_dtype != "e4m3":
        return 1.0
    largest = max(float(weight.abs().max()) for weight in weights)
    return float(torch.tensor(LARGEST_FLOAT[8] * LARGEST_FLOAT[4] / max(largest, 1e-30)))


def cut(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """A weight cut into the parts that share a scale, `[rows, groups, weights]`.

    Incomplete blocks are filled with zeros.
    """
    tall, wide = scheme.rows_per_scale(len(weight)), scheme.group_length(weight.shape[1])
    if tall == 1 and weight.shape[1] % wide == 0:
        return weight.reshape(len(weight), -1, wide)
    rows, groups = scheme.grid((weight.shape[0], weight.shape[1]))
    padded = F.pad(weight, (0, groups * wide - weight.shape[1], 0, rows * tall - len(weight)))
    return padded.reshape(rows, tall, groups, wide).transpose(1, 2).reshape(rows, groups, -1)


def block_grid(weight: Tensor, scheme: QuantScheme, importance: Tensor | None = None) -> Grid:
    """The grid of a block type of ggml for a weight `[rows, in]`.

    The search weighs each column's errors by its `importance` `[in]`.
    """
    return Grid(scheme, *search_blocks(weight, scheme, importance))


def find_grid(
    weight: Tensor, scheme: QuantScheme, search: str, importance: Tensor | None = None, global_scale: float = 1.0
) -> Grid:
    """Scales and zero points of a weight `[out, in]`, fp32 or stored type.

    With `search` `absmax` the grid covers the whole range of each group. `mse` tries shrunken ranges and keeps the one
    of least squared error, where columns are weighed by `importance` `[in]`, the Hessian's diagonal, if it is given.
    `hessian` weighs the error by each group's own block of the Hessian, `importance` `[groups, length, length]`. Raises
    RecipeError for an unknown search.
    """
    if search not in SEARCHES:
        raise RecipeError(f"scale_search is {search!r}; one of {list(SEARCHES)} was expected")
    if scheme.block_type is not None:
        return block_grid(weight, scheme, importance if importance is None or importance.ndim == 1 else None)
    groups = cut(weight, scheme)
    if importance is not None and search == "mse":
        importance = cut(importance.expand(scheme.rows_per_scale(len(weight)), -1), scheme)
    if search != "hessian" and is_compiled(scheme, weight.device.type):
        weights = importance.reshape(-1).numpy() if importance is not None and search == "mse" else None
        flat = to_numpy(groups.flatten(1))
        scales, zeros, *_ = round_groups(flat, groups.shape[-1], scheme, search == "mse", weights, with_codes=False)
        return Grid(scheme, torch.from_numpy(scales), torch.from_numpy(zeros))
    if search == "absmax":
        return Grid(scheme, *range_grid(groups.float(), scheme, 1.0, global_scale))
    blocks = search == "hessian"
    # Parts fit into a core's cache. Products are made in one piece, since their last bits depend on their size.
    step = len(groups) if blocks else max(_CACHED_WEIGHTS // (groups.shape[1] * groups.shape[2]), 1)
    cuts = [groups[i : i + step].float() for i in range(0, len(groups), step)]
    parts = [_try_all(part, scheme, importance, blocks, global_scale) for part in cuts]
    return Grid(scheme, torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))


def _try_all(
    groups: Tensor, scheme: QuantScheme, importance: Tensor | None, blocks: bool = False, global_scale: float = 1.0
) -> Grid:
    """The grid of the range with the least error, for `groups` `[rows, groups, weights]`."""
    shrinks = torch.tensor(SHRINKS, dtype=torch.float64, device=groups.device)

    def tried(number: Tensor) -> tuple[Tensor, ...]:
        grid = range_grid(groups, scheme, shrinks[number], global_scale)
        return _weighted(_rounding_error(groups, *grid, scheme), importance, blocks), number, *grid

    def better(best: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        less = other[0] < best[0]
        return tuple(torch.where(less, new, old) for new, old in zip(other, best, strict=True))

    order = numbers_to_try(importance is not None or (scheme.type == "float" and scheme.num_bits == 8))
    numbers = torch.tensor(order, device=groups.device).reshape(-1, 1, 1).expand(-1, *groups.shape[:2])
    best = tried(numbers[0])
    for number in numbers[1:]:
        best = better(best, tried(number))
    middle = best[1]
    for step in (-1, 1) if len(order) < len(SHRINKS) else ():
        best = better(best, tried((middle + step).clamp(0, len(SHRINKS) - 1)))
    return Grid(scheme, best[2], best[3])


def range_grid(
    groups: Tensor, scheme: QuantScheme, shrink: float | Tensor, global_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scales and zeros `[rows, groups]` that cover `shrink` times each group's range.

    Several values of `shrink` add an axis. With signed scales the weight of the largest magnitude gets the lowest code,
    -2^(bits-1).
    """
    if scheme.type == "float":
        largest = groups.abs().amax(-1)
        scale = round_scale(largest * _fp32(shrink / LARGEST_FLOAT[scheme.num_bits]), scheme, global_scale)
        return scale, torch.zeros_like(scale)
    if scheme.symmetric:
        low, high = groups.amin(-1), groups.amax(-1)
        largest = torch.where(-low > high, low, high)
        if scheme.signed_scales:
            scale = round_scale(largest * _fp32(-shrink / scheme.midpoint), scheme)
        else:
            scale = round_scale(largest.abs() * _fp32(shrink * 2 / scheme.max_code), scheme)
        return scale, torch.full_like(scale, scheme.midpoint)
    low, high = groups.amin(-1).clamp(max=0) * _fp32(shrink), groups.amax(-1).clamp(min=0) * _fp32(shrink)
    scale = round_scale((high - low) / scheme.max_code, scheme)
    return scale, torch.clamp(torch.round(-low / scale), 0, scheme.max_code)


def _fp32(factor: float | Tensor) -> float | Tensor:
    """A factor as fp32 tensor; torch would round a Python number differently."""
    return factor.float() if isinstance(factor, Tensor) else factor


def _rounding_error(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    return (round_to(groups, scales, zeros, scheme) - zeros).mul_(scales).sub_(groups)


def _weighted(delta: Tensor, importance: Tensor | None, blocks: bool) -> Tensor:
    """Weighted squared errors of each group, `[rows, groups]`.

    They are Σ δ², Σ importance · δ², or δᵀ H δ with the group's own block of the Hessian.
    """
    if blocks and importance is not None:
        through = torch.bmm(delta.transpose(0, 1), importance).transpose(0, 1)
        return through.mul_(delta).sum(-1)
    delta.square_()
    return delta.sum(-1) if importance is None else (delta * importance).sum(-1)
