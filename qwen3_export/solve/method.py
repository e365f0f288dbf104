"""What a quantization method is. One file of `solve/methods` each, found by its name.

A method module defines

    Options        frozen dataclass of the recipe's `options`, with defaults
    NEEDS_INPUTS   whether it looks at the linears' inputs
    needs_original(options) -> bool     whether the original model must run beside the quantized one
    solve(group, options, pool) -> {local name: Solved}

A group holds the linears that read the same input (q, k, v; o; gate, up; down): what a method sees
at once. It is a stage of a block, not a whole block as it runs: later stages of the block are
calibrated on what the earlier ones have become.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen3_export.core.recipe import QuantScheme, Recipe, check_keys
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import RecipeError
from qwen3_export.solve import methods
from qwen3_export.solve.grid import TORCH_SCALES, Grid
from qwen3_export.solve.moments import Moments

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Group:
    """Linears of one stage that share their input.

    `weights` `[out, in]` fp32 by module name; `hessian` `[in, in]` is the mean of x xᵀ over the
    `tokens` calibration vectors that reached them, None for a method that needs no inputs. `fitted`
    and `held_out` are the moments of most rows and of every eighth, where the original ran beside.
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, QuantScheme]
    hessian: Tensor | None = None
    tokens: int = 0
    fitted: Moments | None = None
    held_out: Moments | None = None


@dataclass(frozen=True)
class Solved:
    """Codes of one linear, and its relative error: weighted by the inputs where they are known."""

    tensor: QuantizedTensor
    error: float


def load_method(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The method's module and its checked options; RecipeError when either is unknown."""
    known = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    if recipe.method not in known:
        raise RecipeError(f"recipe {recipe.name}: unknown method {recipe.method!r}", f"methods: {', '.join(known)}")
    module = importlib.import_module(f"{methods.__name__}.{recipe.method}")
    where = f"recipe {recipe.name}, options"
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    check_keys(recipe.options, list(fields), where)
    for key, value in recipe.options.items():
        wanted = type(fields[key].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise RecipeError(f"{where}: {key} is {value!r}, a {wanted.__name__} was expected")
    return module, module.Options(**recipe.options)


def row_pieces(weight: Tensor) -> list[slice]:
    """Slices of output rows, cut the same way whatever the number of threads."""
    rows = weight.shape[0]
    return [slice(begin, min(begin + ROWS_AT_ONCE, rows)) for begin in range(0, rows, ROWS_AT_ONCE)]


def check_finite(name: str, weight: Tensor) -> None:
    """Raise RecipeError when a weight holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise RecipeError(f"{name}: the weight holds NaN or infinity", "the checkpoint is damaged: compare its hash")


def assemble(name: str, grids: list[Grid], codes: list[Tensor]) -> QuantizedTensor:
    """Join row pieces of grids and fp32 codes into one tensor for the disk."""
    scheme, joined = grids[0].scheme, torch.cat(codes).to(torch.uint8).cpu().numpy()
    scales = torch.cat([grid.scales for grid in grids]).to(TORCH_SCALES[scheme.scale_dtype]).cpu()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.cat([grid.zeros for grid in grids]).to(torch.uint8).cpu().numpy()
    return QuantizedTensor(name, joined.shape, scheme, joined, _to_numpy(scales), zeros)


def _to_numpy(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def ratio(name: str, error: float, total: float) -> float:
    """Relative error, 0 for an all-zero weight; RecipeError when it is not finite."""
    if not math.isfinite(error) or not math.isfinite(total):
        raise RecipeError(f"{name}: its error is not finite", "the weight or its inputs are too large for fp32")
    return error / total if total > 0 else 0.0
