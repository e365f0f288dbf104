"""What a quantization method is. One file of `solve/methods` each, found by its name.

A method module defines

    Options        frozen dataclass of the recipe's `options`, with defaults
    needs_inputs(options) -> bool       whether it looks at the linears' inputs
    needs_original(options) -> bool     whether the original model must run beside the quantized one
    needs_outputs(options) -> int       rows on which the outputs' importance is measured (`solve.outputs`)
    solve(group, options, pool) -> {local name: Solved}

A group holds the linears that read the same input (q, k, v; o; gate, up; down): what a method sees
at once. It is a stage of a block, not a whole block as it runs: later stages of the block are
calibrated on what the earlier ones have become. An option called `fold` asks the block loop to move
scales between neighbours first (`solve.fold`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme, check_keys
from qwen3_export.core.tensor import E2M1, SCALE_TYPES, QuantizedTensor
from qwen3_export.errors import RecipeError
from qwen3_export.model.activations import largest_unit
from qwen3_export.model.workers import Workers
from qwen3_export.solve import methods
from qwen3_export.solve.grid import TORCH_SCALES, Grid
from qwen3_export.solve.moments import Compared

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Group:
    """Linears of one stage that share their input.

    `weights` `[out, in]` by module name, in fp32, or as they are stored where there are no inputs;
    `hessian` `[in, in]` is the mean of x xᵀ over the `tokens` calibration vectors that reached them,
    None for a method that needs no inputs. `compared` are the moments of rows that the
    original ran beside; `input_peak` is the largest |x|, from which a static
    input scale is made; `outputs` are the pieces of G by name (`solve.outputs`), where they were measured.
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, QuantScheme]
    hessian: Tensor | None = None
    tokens: int = 0
    compared: Compared | None = None
    input_peak: float = 0.0
    outputs: Mapping[str, list[Tensor]] = field(default_factory=dict)


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
        if wanted is not bool and isinstance(value, int | float) and not 0 <= value < math.inf:
            raise RecipeError(f"{where}: {key} is {value!r}, a number from 0 was expected")
    return module, module.Options(**recipe.options)


def check_choice(key: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    """Raise RecipeError when an option is not one of its choices."""
    if value not in choices:
        raise RecipeError(f"options: {key} is {value!r}; one of {list(choices)} was expected")


def row_pieces(weight: Tensor, scheme: QuantScheme, at_once: int = ROWS_AT_ONCE) -> list[slice]:
    """Slices of output rows, cut the same way whatever the number of threads, never through a scale's rows."""
    rows, together = weight.shape[0], scheme.rows_per_scale(weight.shape[0])
    step = max(at_once // together, 1) * together
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def check_finite(name: str, weight: Tensor) -> None:
    """Raise RecipeError when a weight holds NaN or infinity."""
    # The least and the largest are NaN as soon as one weight is, and cost a tenth of asking every weight.
    if not all(torch.isfinite(bound) for bound in torch.aminmax(weight)):
        raise RecipeError(f"{name}: the weight holds NaN or infinity", "the checkpoint is damaged: compare its hash")


@dataclass(frozen=True)
class Rows:
    """Some solved output rows: grid, codes in fp32 or as bytes, their squared error and what it is relative to."""

    grid: Grid
    codes: Tensor
    error: float
    total: float


def solve_rows(
    name: str, weight: Tensor, group: Group, solve: Callable[[slice], Rows], pool: Workers,
    global_scale: float = 1.0, cut: Sequence[slice] | None = None,
) -> Solved:  # fmt: skip
    """Solve a weight `[out, in]` by pieces of output rows (`cut`) and join them into one tensor for the disk."""
    scheme = group.schemes[name]

    def piece_of(rows: slice) -> Rows:
        solved = solve(rows)
        return replace(solved, codes=_code_bytes(solved.codes, scheme))

    pieces = pool.map(piece_of, cut or row_pieces(weight, scheme))
    codes = torch.cat([piece.codes for piece in pieces]).numpy()
    scales = torch.cat([piece.grid.scales for piece in pieces])
    if scheme.scale_dtype == "e4m3":
        scales = scales * global_scale
    stored = scales.to(TORCH_SCALES[scheme.scale_dtype]).cpu()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.cat([piece.grid.zeros for piece in pieces]).to(torch.uint8).cpu().numpy()
    static = scheme.activations == "static-tensor"
    tensor = QuantizedTensor(
        name,
        codes.shape,
        scheme,
        codes,
        _to_numpy(stored),
        zeros,
        global_scale=global_scale if scheme.scale_dtype == "e4m3" else None,
        input_scale=_input_scale(group.input_peak, scheme) if static else None,
    )
    return Solved(tensor, ratio(name, sum(piece.error for piece in pieces), sum(piece.total for piece in pieces)))


def _code_bytes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes as they are stored, one per byte, in this machine's memory."""
    if codes.dtype == torch.uint8:
        return codes
    if scheme.type == "int":
        # numpy converts several times as fast as torch.
        return torch.from_numpy(codes.cpu().numpy().astype(np.uint8))
    if scheme.num_bits == 8:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8).cpu()
    sizes = torch.from_numpy(E2M1[:8]).to(codes.device)
    return (torch.bucketize(codes.abs(), sizes) + 8 * torch.signbit(codes)).to(torch.uint8).cpu()


def _input_scale(peak: float, scheme: QuantScheme) -> float:
    """The static scale of a linear's inputs, a bf16 number as the layout stores it; 1 where no token arrived."""
    scale = torch.tensor(peak / largest_unit(scheme)).to(torch.bfloat16)
    return float(scale) if scale > 0 else 1.0


def _to_numpy(tensor: Tensor) -> Any:
    """With the bits unchanged; numpy knows bf16 and the float8 types through ml_dtypes."""
    for name, dtype in TORCH_SCALES.items():
        if tensor.dtype == dtype and name not in ("fp16", "fp32"):
            bits = torch.int16 if tensor.element_size() == 2 else torch.uint8
            return tensor.view(bits).numpy().view(SCALE_TYPES[name])
    return tensor.numpy()


def check_inputs(group: Group) -> None:
    """Raise RecipeError when the group's inputs hold NaN or infinity."""
    # The sum is not finite as soon as one element is not, and costs a tenth of asking every element.
    if group.hessian is not None and not torch.isfinite(group.hessian.sum(dtype=torch.float64)):
        first = next(iter(group.weights))
        raise RecipeError(f"{first}: its inputs hold NaN or infinity", "the checkpoint is damaged, or its config wrong")


def energy(matrix: Tensor, hessian: Tensor | None, products: torch.dtype = torch.float32) -> float:
    """tr(M H Mᵀ), or tr(M Mᵀ) without inputs, summed in fp64; M H in `products`, whose roundings average out."""
    through = matrix if hessian is None else matrix.to(products) @ hessian.to(products)
    return float((through * matrix).sum(dtype=torch.float64))


def ratio(name: str, error: float, total: float) -> float:
    """Relative error, 0 for an all-zero weight; RecipeError when it is not finite."""
    if not math.isfinite(error) or not math.isfinite(total):
        raise RecipeError(f"{name}: its error is not finite", "the weight or its inputs are too large for fp32")
    return error / total if total > 0 else 0.0
