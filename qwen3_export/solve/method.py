"""What a quantization method is. One file of `solve/methods` each, found by its name.

A method module defines

    Options        frozen dataclass of the recipe's `options`, with defaults
    needs_inputs(options) -> bool       whether it looks at the linears' inputs
    needs_original(options) -> bool     whether the original model must run beside the quantized one
    fisher_samples(options) -> int      samples on which the outputs' importance is measured (`calibration.fisher`)
    solve(group, options, pool) -> {local name: Solved}

A group holds the linears that read the same input (q, k, v; o; gate, up; down): what a method sees
at once. It is a stage of a block, not a whole block as it runs: later stages of the block are
calibrated on what the earlier ones have become. An option called `fold` asks the block loop to move
scales between neighbours first (`blocks.fold`).
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

# What an option called `fold` may be; see `blocks.fold`.
FOLDS = ("none", "awq", "smoothquant")


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one stage that share their input.

    `weights` `[out, in]` by module name, in fp32, or as they are stored where there are no inputs;
    `hessian` `[in, in]` is the mean of x xᵀ over the `tokens` calibration vectors that reached them,
    None for a method that needs no inputs. `paired` are the moments of samples that the
    original ran beside; `input_peak` is the largest |x|, from which a static
    input scale is made; `fisher` are the pieces of G by name (`calibration.fisher`), where they were measured.
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
    """Codes of one linear, and its relative error.

    The error is weighted by the inputs where they are known.
    """

    tensor: QuantizedTensor
    error: float


def fold_of(options: Any) -> str:
    """What a method's options move between neighbours before the solve: one of `FOLDS`."""
    return getattr(options, "fold", "none")


def check_choice(key: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    """Raise RecipeError when an option is not one of its choices."""
    if value not in choices:
        raise RecipeError(f"options: {key} is {value!r}; one of {list(choices)} was expected")


def not_finite(name: str) -> RecipeError:
    """What is raised when a weight is no finite number."""
    return RecipeError(f"{name}: the weight holds NaN or infinity", "the checkpoint is damaged: compare its hash")


def ratio(name: str, error: float, total: float) -> float:
    """Relative error, 0 for an all-zero weight; RecipeError when it is not finite."""
    if not math.isfinite(error) or not math.isfinite(total):
        raise RecipeError(f"{name}: its error is not finite", "the weight or its inputs are too large for fp32")
    return error / total if total > 0 else 0.0
