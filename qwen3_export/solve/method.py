"""The interface of quantization methods, the modules of `solve/methods`.

A method module defines

    Options        frozen dataclass of the recipe's `options`, with defaults
    needs_inputs(options) -> bool       whether it looks at the linears' inputs
    needs_original(options) -> bool     whether the original model must run beside the quantized one
    fisher_samples(options) -> int      samples on which the outputs' importance is measured (`calibration.fisher`)
    solve(group, options, pool) -> {module name: SolvedWeight}

    A group holds linears that read the same input (q, k, v; o; gate, up; down). A method sees one group at a time and
    not a whole block, because later groups of a block are calibrated on the quantized earlier ones. An option called
    `fold` asks the block loop to move scales between neighbours first (`blocks.fold`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from qwen3_export.solve.calibration.moments import PairedMoments

# Values of an option called `fold`; see `blocks.fold`.
FOLDS = ("none", "awq", "smoothquant")


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one stage that share their input.

    `weights` are `[out, in]` by module name, in fp32, or in their stored type for methods without inputs. `hessian`
    `[in, in]` is the mean of x xᵀ over the `tokens` calibration vectors that reached the linears, None for methods
    without inputs. `paired` are moments of the samples that also run through the original. `input_peak` is the largest
    |x|, which gives static input scales. `fisher` are the pieces of G by module name (`calibration.fisher`), if they
    were measured.
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, QuantScheme]
    hessian: Tensor | None = None
    tokens: int = 0
    paired: PairedMoments | None = None
    input_peak: float = 0.0
    fisher: Mapping[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class SolvedWeight:
    """Codes of one linear, and its relative error, weighted by the inputs where known."""

    tensor: QuantizedTensor
    error: float


def fold_of(options: Any) -> str:
    """Which scales a method's options fold before the solve: one of `FOLDS`."""
    return getattr(options, "fold", "none")


def check_choice(key: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    """Raise RecipeError when an option is not one of its choices."""
    if value not in choices:
        raise RecipeError(f"options: {key} is {value!r}; one of {list(choices)} was expected")


def not_finite(name: str) -> RecipeError:
    """The error for a weight that is NaN or infinite."""
    return RecipeError(f"{name}: the weight holds NaN or infinity", "the checkpoint is damaged: compare its hash")


def ratio(name: str, error: float, total: float) -> float:
    """Relative error, 0 for an all-zero weight; RecipeError when it is not finite."""
    if not math.isfinite(error) or not math.isfinite(total):
        raise RecipeError(f"{name}: its error is not finite", "the weight or its inputs are too large for fp32")
    return error / total if total > 0 else 0.0
