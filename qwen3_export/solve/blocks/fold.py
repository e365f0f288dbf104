"""Moving scales between neighbours without changing what the model computes.

    what is divided by s                 what is multiplied by s, column by column
    input_layernorm                      q_proj, k_proj, v_proj
    v_proj (rows)                        o_proj, query heads that share a value head alike
    post_attention_layernorm             gate_proj, up_proj of all experts, and the router
    up_proj (rows)                       down_proj, for each expert
    final norm                           the head of an untied model, after all blocks (`head`)

q and k themselves are normalised per head, so nothing can be moved through them. A norm is stored in
16 bits: it is rounded first, and the columns are multiplied by what was really divided, so that
nothing is lost. The router stays in 16 bits: before it, s is a power of two, which loses nothing.

    awq          s = mean|x|^α / w^β on a grid of α; the least rounding error wins (Lin et al. 2023). A channel
                 that the calibration text uses less than the median one counts like the median: to shrink
                 its weights' share of the grid would harm other text, which may well use it
    smoothquant  s = max|x|^½ / max|w|^½ at the norms, where activations are rounded (Xiao et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.architecture import ROUTER
from qwen3_export.core.qwen3 import HEAD
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.block import Block
from qwen3_export.model.streamed import change
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.moments import Moments
from qwen3_export.solve.chunk_sizes import FOLD_EXPERTS
from qwen3_export.solve.rounding.grid import find_grid, round_to, shared_global_scale

_EXPONENTS = [0.1 * step for step in range(1, 11)]
# So many rows of a linear, evenly chosen, speak for all of it.
ROWS_TRIED = 96
# Less than this is noise, and a fold is a change to more weights.
_LEAST_GAIN = 0.1


@dataclass(frozen=True)
class FoldSite:
    """One row of the table above, with local names.

    `index` `[in]` is the source row of each column.
    """

    source: str
    targets: tuple[str, ...]
    stage: int
    index: Tensor

    @property
    def is_norm(self) -> bool:
        """Whether the source is a norm's weight `[in]` and not a linear's rows."""
        return "." not in self.source

    def collapse(self, values: Tensor) -> Tensor:
        """Means `[source rows]` over the columns that share a source row."""
        rows, index = int(self.index.max()) + 1, self.index.to(values.device)
        total = torch.zeros(rows, device=values.device).index_add_(0, index, values)
        return total / torch.zeros(rows, device=values.device).index_add_(0, index, torch.ones_like(values))


def fold_sites(block: Block) -> list[FoldSite]:
    """Every place of a block where scales can move, in running order."""
    found = []
    for number, stage in enumerate(block.stages):
        index = torch.from_numpy(stage.source_rows())
        if stage.norm is not None:
            router = (ROUTER,) if stage.routed else ()
            found.append(FoldSite(stage.norm, (*stage.names, *router), number, index))
        else:
            owners = zip(stage.prefixes, stage.groups, strict=True)
            found += [FoldSite(f"{owner}.{stage.source}", tuple(names), number, index) for owner, names in owners]
    return found


def choose_folds(
    kind: str,
    block: Block,
    stage: int,
    schemes: Mapping[str, QuantScheme],
    moments_of: Callable[[str], Moments | None],
    pool: Workers,
) -> list[tuple[FoldSite, Tensor]]:
    """The sites of a stage where scales are worth moving, with the scales.

    They are moved by `apply_folds` when all stages are known.

    `moments_of(name)` gives the moments of a linear's inputs in the block as it is, sizes included, or None
    where they say too little to go by.
    """
    found = []
    for site in (site for site in fold_sites(block) if site.stage == stage):
        # The last target is the router where there is one: its input is that of all experts.
        moments = moments_of(site.targets[-1])
        scales = None if moments is None else search_scales(kind, site, block, moments, schemes, pool)
        found += [(site, scales)] if scales is not None else []
    return found


def apply_folds(
    block: Block, chosen: list[tuple[FoldSite, Tensor]], stored_as: Callable[[str], np.dtype]
) -> dict[str, NDArray]:
    """Move all chosen scales.

    Returns norms and routers as they are stored, by local tensor name.

    `stored_as(name)` is the type on disk of a local tensor.
    """
    replaced: dict[str, NDArray] = {}
    for site, scales in chosen:
        name, router = f"{site.source}.weight", f"{ROUTER}.weight"
        changed = apply_fold(block, site, scales, stored_as(name))
        if changed is not None:
            replaced[name] = changed
        if ROUTER in site.targets:
            replaced[router] = stored(block.weights[ROUTER], stored_as(router))
    return replaced


def search_scales(
    kind: str, site: FoldSite, block: Block, moments: Moments, schemes: Mapping[str, QuantScheme], pool: Workers
) -> Tensor | None:
    """The scales `[source rows]` to move at a site, or None.

    A site whose linears are not all quantized (the router aside) is left alone.
    """
    linears = [name for name in site.targets if name != ROUTER]
    quantized = all(name in schemes for name in linears) and (site.is_norm or site.source in schemes)
    if not quantized or moments.tokens == 0:
        return None
    if kind == "smoothquant":
        scales = _smooth(site, (block.weights[name] for name in linears), moments)
    else:
        tried = {name: block.weights[name] for name in linears[: 2 * FOLD_EXPERTS]}
        scales = _awq(site, tried, moments, schemes, pool)
    if scales is None or ROUTER not in site.targets:
        return scales
    return torch.exp2(torch.log2(scales).round())


def search_head_scales(
    rows: Tensor, inputs: Sequence[Tensor], scheme: QuantScheme, moments: Moments, pool: Workers
) -> Tensor | None:
    """Scales `[hidden]` to move from the final norm to the head, or None.

    `rows` `[some, hidden]` of the head speak for all of them, and `inputs`, some samples' `[tokens, hidden]`, for what
    is rounded to bytes: at the head this costs as much as rounding the codes does.
    """
    site = FoldSite("norm", (HEAD,), 0, torch.arange(rows.shape[1]))

    def noise(scales: Tensor) -> float:
        return sum(input_noise(rows * scales, x / scales, scheme) for x in inputs) / len(inputs)

    return _awq(site, {HEAD: rows}, moments, {HEAD: scheme}, pool, noise)


def input_noise(weight: Tensor, inputs: Tensor, scheme: QuantScheme) -> float:
    """Squared error of `weight @ x` that rounding x to int8 causes, per token.

    Runtimes round blocks of 32 channels with one scale, llama.cpp beside K-quants of 256.
    """
    width = weight.shape[1]
    length = next(n for n in (256 if scheme.type == "kquant" else 32, 32, width) if width % n == 0)
    steps = inputs.abs().reshape(len(inputs), -1, length).amax(-1) / 127
    sizes = weight.square().sum(0).reshape(-1, length).sum(-1)
    return float((steps.square().mean(0) * sizes).double().sum() / 12)


def _awq(
    site: FoldSite, weights: Mapping[str, Tensor], moments: Moments, schemes: Mapping[str, QuantScheme], pool: Workers,
    beside: Callable[[Tensor], float] = lambda _: 0.0,
) -> Tensor | None:  # fmt: skip
    """The best scales of AWQ's grid, or None where the gain is noise.

    Tried are s = mean|x|^α, and mean|x|^α / mean|w|^(1 − α) with each row's weights relative to its largest. `beside`
    is an error that scales cause beside that of the codes.
    """
    assert moments.mean_abs is not None
    x = site.collapse(moments.mean_abs)
    x = x.clamp(min=max(float(x.median()), 1e-8))
    hessian = _at_least_median(moments.hessian)
    w = site.collapse(torch.stack([_relative(weight, schemes[name]) for name, weight in weights.items()]).mean(0))
    candidates = [torch.ones_like(x)]
    for exponent in _EXPONENTS:
        candidates += [x**exponent, x**exponent / (w ** (1 - exponent) + 1e-4)]
    candidates = [_centred(scales) for scales in candidates]
    tried = {name: _some_rows(weight, schemes[name]) for name, weight in weights.items()}

    def error(scales: Tensor) -> float:
        spread = scales[site.index]
        return sum(_error(weight, spread, hessian, schemes[name]) for name, weight in tried.items()) + beside(scales)

    errors = pool.share_map("fold", error, candidates)
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best] if errors[best] < errors[0] * (1 - _LEAST_GAIN) else None


def _at_least_median(hessian: Tensor) -> Tensor:
    """H `[in, in]` with a diagonal that is nowhere below its median.

    It stays positive semidefinite.
    """
    diagonal = hessian.diagonal()
    return hessian + torch.diag((diagonal.median() - diagonal).clamp(min=0))


def _some_rows(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Rows that speak for all; all of them where some share a scale."""
    return weight if scheme.strategy in ("block", "tensor") else weight[:: math.ceil(len(weight) / ROWS_TRIED)]


def _relative(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Mean over rows of |w| as a share of its group's largest, `[in]`."""
    length = scheme.group_length(weight.shape[1])
    length = weight.shape[1] if weight.shape[1] % length else length
    groups = weight.abs().reshape(len(weight), -1, length)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape).mean(0)


def _error(weight: Tensor, spread: Tensor, hessian: Tensor, scheme: QuantScheme) -> float:
    """tr(Δ H Δᵀ) of rounding W·s to nearest, divided by s again."""
    scaled = weight * spread
    grid = find_grid(scaled, scheme, "absmax", None, shared_global_scale([scaled], scheme)).columns(weight.shape)
    codes = round_to(scaled, grid.scales, grid.zeros, scheme)
    delta = ((codes - grid.zeros) * grid.scales - scaled) / spread
    return float(((delta @ hessian) * delta).double().sum())


def _smooth(site: FoldSite, weights: Iterable[Tensor], moments: Moments) -> Tensor | None:
    if not site.is_norm or moments.peak is None:
        return None
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scales = moments.peak.clamp(min=1e-5).sqrt() / largest.clamp(min=1e-5).sqrt()
    return _centred(scales)


def _centred(scales: Tensor) -> Tensor:
    """Scales whose largest and smallest lie evenly around one.

    They are clamped to what 16 bits bear.
    """
    scales = scales.clamp(min=1e-6)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(2.0**-8, 2.0**8)


def apply_fold(block: Block, site: FoldSite, scales: Tensor, stored_as: np.dtype) -> NDArray | None:
    """Move the scales.

    Returns a norm's new weight as it is stored (`stored_as`), None for a linear source.
    """
    kept_as = None
    if site.is_norm:
        kept_as, divided, scales = divide_norm(block.weights[site.source], scales, stored_as)
        block.weights[site.source] = divided
    else:
        change(block.weights, site.source, lambda weight: weight / scales[:, None])
    columns = scales[site.index]
    for name in site.targets:
        change(block.weights, name, lambda weight: weight * columns)
    return kept_as


def divide_norm(norm: Tensor, scales: Tensor, stored_as: np.dtype) -> tuple[NDArray, Tensor, Tensor]:
    """A norm divided by scales: as stored, in fp32, and what was divided.

    A channel that the norm silences, or that 16 bits cannot hold, keeps its scale.
    """
    _, divided = _store(norm / scales, stored_as)
    kept = (divided == 0) | ~torch.isfinite(divided)
    array, divided = _store(torch.where(kept, norm, divided), stored_as)
    return array, divided, torch.where(kept, 1.0, norm / divided)


def _store(values: Tensor, stored_as: np.dtype) -> tuple[NDArray, Tensor]:
    """Values in their type on disk, and the same numbers back in fp32."""
    array = stored(values, stored_as)
    return array, torch.from_numpy(array.astype(np.float32)).to(values.device)


def stored(values: Tensor, stored_as: np.dtype) -> NDArray:
    """Values in their type on disk."""
    return values.cpu().numpy().astype(stored_as)
