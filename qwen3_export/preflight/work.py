"""How much work of each kind a block is.

`timing` scales the seconds of a trial with it.

Kinds are the labels of `Workers.share`, those of experts behind `experts/`. Units are multiplications; only ratios
within a kind matter. For linears `[out, w]` that share an input, t tokens of which reach them:

    outputs   t · out · w for the samples that measure which outputs matter
    advance   t · out · w, also through the original; reading weights costs as much as `_READ` tokens
    moments   (t + _SUMS) · w² / 2 and t · w², the latter for the drift; out · w in its place where there is a target
    drift     4 w³                          triangular solves with two factors
    confirm   out / 4 · w² · (6 or 8)       products and solves with every fourth row
    shift     out · w² · (2 or 4)
    fold      w² for some rows of each linear
    rows      out · w · (columns + products · w)
    factors   w³ / 3 for each Cholesky factor that no other thread works beside, half of that for the inverse
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.model.windows import RESIDENT_BYTES
from qwen3_export.solve.chunk_sizes import FOLD_EVERY, FOLD_EXPERTS, ROUTED_TOKENS, WIDE
from qwen3_export.text.samples import Samples

EXPERTS = "experts/"
# Tokens whose products take as long as reading the weights for them.
_READ = 150
# Tokens whose sums take as long as making room for them, joining them and filling in their mirror image.
_SUMS = 4000
# Columns that a fold's candidates cost beside the products with H.
_TRIED = 8192


@dataclass(frozen=True)
class Solving:
    """What of a recipe decides the kinds of work.

    `original`: share of the samples that run through the original too. `products`: matrix products with H that
    rounding a row takes. `outputs`: samples of the pass that measures which outputs matter. `starved`: share of the
    experts below the floor, which get no target shift.
    """

    original: float = 0.0
    products: float = 4.0
    fold: bool = False
    outputs: int = 0
    starved: float = 0.0

    @classmethod
    def of(cls, options: Any, original: bool, fold: bool, outputs: int, starved: float) -> Solving:
        """From a method's options; a method without columns has the error's products alone."""
        passes = getattr(options, "descent", 0)
        # GPTQ itself, the gradient and its updates in each pass, a refit between passes.
        columns = 1 + 3 * passes + 2 * max(passes - 1, 0) if hasattr(options, "descent") else 0
        return cls(1 / getattr(options, "shift_every", 1) if original else 0.0, 4.0 + columns, fold, outputs, starved)


@dataclass(frozen=True)
class Group:
    """Linears that share an input: rows together, width, tokens that reach them."""

    linears: int
    out_rows: int
    width: int
    tokens: float
    has_target: bool
    is_expert: bool
    count: int = 1


def groups_of(config: Qwen3Config, layer: int, tokens: int) -> Iterator[Group]:
    """The groups of a block; equal experts are one group with a count."""
    for stage in config.block(layer).stages:
        names = [stage.groups[0]] if stage.routed else stage.groups
        for group in names:
            shapes = [config.linear_shapes(layer)[name] for name in group]
            here = tokens * config.experts_per_token / config.num_experts if stage.routed else tokens
            count = config.num_experts if stage.routed else 1
            rows = sum(shape[0] for shape in shapes)
            yield Group(len(shapes), rows, shapes[0][1], here, stage.writes_residual, is_expert(group[0]), count)


def block_work(config: Qwen3Config, layer: int, samples: Samples, solving: Solving) -> dict[str, float]:
    """Units of work on a block by kind.

    `rows` has two; see `rows_work`.
    """
    found: dict[str, float] = defaultdict(float)
    tokens, measured = samples.tokens, min(solving.outputs, len(samples.ids)) * len(samples.ids[0])
    for group in groups_of(config, layer, tokens):
        found["outputs"] += measured * group.out_rows * group.width * group.count
        found["advance"] += _advance(config, group, tokens, solving)
        within = EXPERTS if group.is_expert else ""
        for kind, units in _solve(group, solving).items():
            found[within + kind] += group.count * units
        if solving.fold:
            found["fold"] += group.linears * min(group.count, FOLD_EXPERTS) * group.width * (group.width + _TRIED)
    return dict(found)


def rows_work(config: Qwen3Config, layer: int, solving: Solving) -> dict[str, tuple[float, float]]:
    """Of rounding rows: weights, and multiplications with H, by kind."""
    found = {"rows": (0.0, 0.0), f"{EXPERTS}rows": (0.0, 0.0)}
    for group in groups_of(config, layer, 0):
        kind = f"{EXPERTS}rows" if group.is_expert else "rows"
        weights = group.count * group.out_rows * group.width
        old = found[kind]
        found[kind] = (old[0] + weights, old[1] + weights * group.width * solving.products)
    return found


def _advance(config: Qwen3Config, group: Group, tokens: int, solving: Solving) -> float:
    weights = group.out_rows * group.width * group.count
    passes = 1 + solving.original + (1 / FOLD_EVERY if solving.fold else 0)
    units = passes * group.tokens * weights
    if group.is_expert:
        # Where the experts of a layer do not stay in memory, they are read for every so many tokens.
        stay = 2 * weights <= RESIDENT_BYTES // 2
        batches = 1.0 if stay else max(1.0, tokens / ROUTED_TOKENS)
        units += passes * batches * weights * _READ
    return units


def _solve(group: Group, solving: Solving) -> dict[str, float]:
    """Units of solving one group by kind."""
    rows, width, shifted = group.out_rows, group.width, solving.original > 0
    beside = 1 - solving.starved if group.is_expert else 1.0
    other = rows * width if group.has_target else width * width
    found = {"moments": (group.tokens + _SUMS) * width * width / 2 + group.tokens * beside * solving.original * other}
    factors = 1.0
    if shifted:
        steps = (8, 4) if group.has_target else (6, 2)
        found["confirm"] = beside * rows / 4 * width**2 * steps[0]
        found["shift"] = beside * rows * width**2 * steps[1]
        if not group.has_target:
            found["drift"] = beside * 4 * width**3
        # Two more factors: one after the other where they are wide, else beside this one.
        factors += beside * (2.0 if width > WIDE or group.is_expert else 1.0)
    found["factors"] = (factors + 0.5) * width**3 / 3
    return found
