"""Rounding to nearest without torch: integer codes from weights as stored.

    rows of a linear, some at a time:   read ─▶ range, scale, codes (`rounding.kernels`) ─▶ their place in the result

The model does not run, so a block takes no more memory than its codes, and only the compiled loops are imported. The
result is the same as that of `rounding.nearest` for the same weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.memory import lacks_memory
from qwen3_export.core.process import uncollected, uninterrupted
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.errors import MissingRuntimeError
from qwen3_export.model.workers import Workers
from qwen3_export.solve.job import SolvedBlock, SolvedLinear
from qwen3_export.solve.method import SolvedWeight, not_finite, ratio
from qwen3_export.solve.methods import load_method
from qwen3_export.solve.rounding.scale_search import ROUNDED_AT_ONCE, is_one_pass, round_groups


def serves(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether every matrix that the recipe quantizes without inputs can be rounded here."""
    if recipe.method != "rtn" or any(recipe.scheme_for(module) for module in checkpoint.config.outer_matrices()):
        return False
    _, options = load_method(recipe)
    if options.scale_search == "hessian" or options.fold != "none":
        return False
    shapes = checkpoint.config.all_linears()
    schemes = {name: scheme for name in shapes if (scheme := recipe.scheme_for(name))}
    return all(is_one_pass(scheme, shapes[name][1]) and not scheme.has_input_scale for name, scheme in schemes.items())


def import_loops() -> None:
    """Import the compiled loops, which must not meet Ctrl-C.

    Raises MissingRuntimeError where numba is not installed.
    """
    try:
        with uninterrupted(), uncollected():
            importlib.import_module("qwen3_export.solve.rounding.kernels")
    except ImportError as error:
        if lacks_memory(error):
            raise
        raise MissingRuntimeError("rounding to nearest needs numba", "pip install 'qwen3-export[rtn]'") from error


@dataclass(frozen=True)
class _Linear:
    """A linear `[out, in]` while its rows are rounded; scales in fp32."""

    name: str
    scheme: QuantScheme
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]

    def solved(self, missed: float, whole: float) -> SolvedWeight:
        """The finished linear, as it is written to the disk."""
        error, scheme = ratio(self.name, missed, whole), self.scheme
        zeros = None if scheme.symmetric else self.zeros.astype(np.uint8)
        scales = self.scales.astype(SCALE_TYPES[scheme.scale_dtype])
        return SolvedWeight(QuantizedTensor(self.name, self.codes.shape, scheme, self.codes, scales, zeros), error)


def solve_block(checkpoint: Checkpoint, recipe: Recipe, options: Any, layer: int, pool: Workers) -> SolvedBlock:
    """Round a block's linears; RecipeError where a weight is not finite.

    `options` are those of `solve.methods.rtn`. The pieces do not depend on the number of threads.
    """
    config, prefix = checkpoint.config, block_name(layer)
    shapes = {f"{prefix}.{name}": shape for name, shape in config.linear_shapes(layer).items()}
    linears = [_empty(name, shape, scheme) for name, shape in shapes.items() if (scheme := recipe.scheme_for(name))]
    tasks = [(linear, out_rows) for linear in linears for out_rows in _pieces(linear.codes.shape)]

    def work(task: tuple[_Linear, slice]) -> tuple[float, float]:
        return _round(checkpoint, *task, options.scale_search != "absmax")

    sums: Mapping[str, list[float]] = {linear.name: [0.0, 0.0] for linear in linears}
    for (linear, _), (missed, whole) in zip(tasks, pool.map(work, tasks), strict=True):
        sums[linear.name][0] += missed
        sums[linear.name][1] += whole
    solved = {linear.name: SolvedLinear(linear.solved(*sums[linear.name]), 0) for linear in linears}
    return SolvedBlock(solved, {}, [0] * (config.num_experts if config.is_sparse(layer) else 0))


def _empty(name: str, shape: tuple[int, int], scheme: QuantScheme) -> _Linear:
    grid = scheme.grid(shape)
    return _Linear(name, scheme, np.empty(shape, np.uint8), np.empty(grid, np.float32), np.empty(grid, np.float32))


def _pieces(shape: tuple[int, int]) -> list[slice]:
    step = max(ROUNDED_AT_ONCE // shape[1], 1)
    return [slice(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step)]


def _round(checkpoint: Checkpoint, linear: _Linear, out_rows: slice, search: bool) -> tuple[float, float]:
    """Round some rows and put their codes in place.

    Returns Σ δ² and Σ w².
    """
    weight = checkpoint.rows(f"{linear.name}.weight", out_rows.start, out_rows.stop)
    scheme = linear.scheme
    scales, zeros, codes, missed, whole = round_groups(weight, scheme.group_length(weight.shape[1]), scheme, search)
    # Sums of squares are not finite where a weight is not, or where its square is too large for fp64.
    if not np.isfinite(whole) and not np.isfinite(weight.astype(np.float32)).all():
        raise not_finite(linear.name)
    linear.codes[out_rows], linear.scales[out_rows], linear.zeros[out_rows] = codes, scales, zeros
    return missed, whole
