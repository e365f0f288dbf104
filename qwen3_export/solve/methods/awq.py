"""AWQ (Lin et al. 2023): scale salient channels up, then clip ranges.

    min over s of ‖X Wᵀ − (X / s) Q(W · s)ᵀ‖²     1 / s is folded into the norm or linear before   (`blocks.fold`)
    min over shrink of δᵀ H_g δ   per group       δ = w − Q(w) with a shrunken range               (scale search)

The clip search weighs the rounding error by the group's own block H_g of H = mean x xᵀ. That is the paper's output
error of the group, but over all tokens and rows, of which the paper takes samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import FOLDS, LinearGroup, SolvedWeight, check_choice
from qwen3_export.solve.rounding.nearest import round_group
from qwen3_export.solve.rounding.scale_search import SEARCHES


@dataclass(frozen=True)
class Options:
    """`scale_search`: `hessian` (the clip search), `mse` or `absmax`.

    `fold`: `awq`, or `none` to clip only.
    """

    scale_search: str = "hessian"
    fold: str = "awq"

    def __post_init__(self) -> None:
        check_choice("scale_search", self.scale_search, SEARCHES)
        check_choice("fold", self.fold, FOLDS)


def needs_inputs(_options: Options) -> bool:
    """Always true: both searches weigh errors by the inputs."""
    return True


def needs_original(_options: Options) -> bool:
    """Always false: AWQ compares a layer with itself."""
    return False


def fisher_samples(_options: Options) -> int:
    """Always 0: errors are not weighed by outputs."""
    return 0


def solve(group: LinearGroup, options: Options, pool: Workers) -> dict[str, SolvedWeight]:
    """Clip and round the weights of a group whose scales are already folded."""
    return round_group(group, options.scale_search, pool)
