"""Round to nearest: code = clamp(round(w / s) + z).

s = 2·max|w| / (2^bits − 1)              per group       scale_search: absmax, without calibration
min over s, z of Σ (w − (code − z)·s)²   per group       scale_search: mse, without calibration
min over s, z of δᵀ H_g δ                per group       scale_search: hessian, δ = w − (code − z)·s

H_g is the group's own block of H = mean x xᵀ over the calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import FOLDS, LinearGroup, SolvedWeight, check_choice
from qwen3_export.solve.rounding.scale_search import SEARCHES


@dataclass(frozen=True)
class Options:
    """Options of the recipe.

    `scale_search`: `absmax` covers the whole range, `mse` and `hessian` try shrunken ranges per group.
    `fold`: `none`, `awq` or `smoothquant`; see `blocks.fold`.
    """

    scale_search: str = "mse"
    fold: str = "none"

    def __post_init__(self) -> None:
        check_choice("scale_search", self.scale_search, SEARCHES)
        check_choice("fold", self.fold, FOLDS)


def needs_inputs(options: Options) -> bool:
    """Whether errors are weighed by inputs: with `scale_search: hessian` only."""
    return options.scale_search == "hessian"


def needs_original(_options: Options) -> bool:
    """Always false: rounding looks at no outputs."""
    return False


def fisher_samples(_options: Options) -> int:
    """Always 0: errors are not weighed by outputs."""
    return 0


def solve(group: LinearGroup, options: Options, pool: Workers) -> dict[str, SolvedWeight]:
    """Round every weight of the group.

    Errors are reported relative to the weight's own size, both weighed by the inputs where these are known.
    """
    # Imported here, so that a run without inputs needs no torch: see `blocks.rtn_without_torch`.
    from qwen3_export.solve.rounding.nearest import round_group

    return round_group(group, options.scale_search, pool)
