"""What the calibration rows say about one linear's inputs: means over all tokens that reach it.

    hessian   mean x xᵀ         [in, in]   x: its inputs in the quantized model so far
    drift     mean (x̃ − x) xᵀ   [in, in]   x̃: the same inputs in the original model
    target    mean t xᵀ         [out, in]  t: what it should answer, where that is known
    mean_abs  mean |x|          [in]
    peak      max |x|           [in]

Sums run over column strips side by side, each over the rows in their order, so that they do not
depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3_export.model.workers import Workers, results

_STRIP = 512
# Tokens whose products are rounded to 16 bits together: the more of these roundings, the more they average out.
_TOKENS = 2048
# Inputs with so many times the mean energy are loud.
_LOUD = 8.0
# Every so many tokens of a row tell its center.
_EVERY = 8
# Centers whose contributions are added together.
_CENTERS = 128


@dataclass(frozen=True)
class Sample:
    """One row's inputs `[n, in]`, how far they are from the original's, and the wanted answers `[n, out]`."""

    x: Tensor
    drift: Tensor | None = None
    target: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """See the module docstring; `drift` or `target` only where the original was run beside. `rounded`: what was
    summed are products in 16 bits."""

    tokens: int
    hessian: Tensor
    drift: Tensor | None = None
    target: Tensor | None = None
    mean_abs: Tensor | None = None
    peak: Tensor | None = None
    rounded: bool = False

    def join(self, other: Moments) -> Moments:
        """Moments over both sets of tokens; what only one of them knows is left out."""
        total = max(self.tokens + other.tokens, 1)

        def mean(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, other.tokens / total)

        hessian = torch.lerp(self.hessian, other.hessian, other.tokens / total)
        drift, target = mean(self.drift, other.drift), mean(self.target, other.target)
        peak = None if self.peak is None or other.peak is None else torch.maximum(self.peak, other.peak)
        mean_abs = mean(self.mean_abs, other.mean_abs)
        rounded = self.rounded or other.rounded
        return Moments(self.tokens + other.tokens, hessian, drift, target, mean_abs, peak, rounded)


@dataclass(frozen=True)
class Compared:
    """Moments of the rows that ran through the original too: most of them, those held out, and both together."""

    fitted: Moments
    held_out: Moments
    both: Moments


def collect(
    sample: Callable[[int], Sample], rows: Sequence[int], at_once: int, size: int, device: str, pool: Workers,
    sizes: bool = True,
) -> Moments:  # fmt: skip
    """Moments over `rows`, `at_once` of them in memory and as many on their way; `size` is the number of inputs.

    `sizes`: whether the mean and the largest |x| are wanted too, which take as long as a tenth of the Hessian.
    """
    return collect_parts([(sample, rows)], at_once, size, device, pool, sizes)[0]


def collect_parts(
    parts: Sequence[tuple[Callable[[int], Sample], Sequence[int]]], at_once: int, size: int, device: str,
    pool: Workers, sizes: bool = True,
) -> list[Moments]:  # fmt: skip
    """Moments over several sets of rows, each with its own samples, one set after another; see `collect`."""
    found = [_Sums(size, device, pool, sizes) for _ in parts]
    cuts = [
        (sums, sample, rows[begin : begin + at_once])
        for sums, (sample, rows) in zip(found, parts, strict=True)
        for begin in range(0, len(rows), at_once)
    ]

    def ask(number: int) -> list[Future[Sample]]:
        return [pool.start(partial(cuts[number][1], row)) for row in cuts[number][2]] if number < len(cuts) else []

    coming, adding = ask(0), list[Future[None]]()
    for number, (sums, _, _) in enumerate(cuts):
        # The next are asked for first, so that the processors have work while the samples are put together.
        samples, coming = results(coming), ask(number + 1)
        joined = sums.join(samples)
        results(adding)
        adding = sums.start(joined)
    results(adding)
    return [sums.means() for sums in found]


@dataclass(frozen=True)
class _Common:
    """What was taken off some rows: their centers c, what was left of each, and how many tokens each has."""

    centers: list[Tensor] = field(default_factory=list)
    lefts: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    others: dict[str, list[Tensor]] = field(default_factory=dict)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, B `[2 rows, in]`: what is missing from Σ d dᵀ is Aᵀ B."""
        c, d = torch.stack(self.centers), torch.stack(self.lefts)
        count = torch.tensor(self.counts, dtype=c.dtype)[:, None]
        return torch.cat([c, d]), torch.cat([count * c + d, c])


@dataclass(frozen=True)
class _Joined:
    """Some rows' inputs, less what those of a row have in common, and what they are multiplied with besides
    themselves; `common` only when much of it has come together."""

    x: Tensor
    d: Tensor
    left: dict[str, Tensor]
    common: _Common | None = None


class _Sums:
    """Sums over the samples so far.

    Products in bf16 are rounded to 16 bits before they are added up, which would be as large as the damping where
    inputs have much in common, as those of one text have after attention. So d = x − c is summed, c being about the
    mean of the row, and what c contributes is added in fp32:  Σ x xᵀ = Σ d dᵀ + c (Σ d)ᵀ + (Σ d) cᵀ + n c cᵀ. What a
    few inputs that are much larger than the others have in common, as those that a first token makes, is harmful
    still: the sums between these `loud` ones are made once more in fp32.
    """

    def __init__(self, size: int, device: str, pool: Workers, sizes: bool) -> None:
        self.size, self.device, self.pool, self.sizes, self.tokens = size, device, pool, sizes, 0
        length = _STRIP if size > 2 * _STRIP else _STRIP // 2
        # The longest first, so that the processors finish together.
        self.strips = [slice(i, min(i + length, size)) for i in range(0, size, length)][::-1]
        self.hessian = torch.zeros(size, size, device=device)
        self.sum_abs, self.peak = (torch.zeros(size, device=device) for _ in range(2))
        self.others = dict[str, Tensor]()
        self.rounded, self.common = False, _Common()
        self.loud: Tensor | None = None
        self.between = torch.zeros(0, 0, device=device)

    def join(self, samples: list[Sample]) -> _Joined:
        """A few rows more as one matrix each, counted in all sums but those of the strips."""
        parts = [item.x for item in samples]
        given = [name for name in ("drift", "target") if samples and getattr(samples[0], name) is not None]
        left = {name: torch.cat([getattr(item, name) for item in samples]) for name in given}
        added = sum(map(len, parts))
        self.tokens += added
        for name, values in left.items():
            if name not in self.others:
                self.others[name] = torch.zeros(values.shape[1], self.size, device=self.device)
        if parts[0].dtype == torch.float32 or not added:
            x = torch.cat(parts)
            return _Joined(x, x, left)
        self.rounded, full = True, None
        if len(self.common.counts) >= _CENTERS:
            full, self.common = self.common, _Common()
        d = torch.empty(added, self.size, dtype=parts[0].dtype)
        for item, rows in zip(samples, torch.split(d, [len(part) for part in parts]), strict=True):
            self._center(item, rows)
        if self.loud is None:
            energy = d.float().square().mean(0)
            self.loud = (energy > _LOUD * energy.mean()).nonzero().flatten()
            self.between = torch.zeros(len(self.loud), len(self.loud), device=self.device)
        own = torch.cat([part[:, self.loud] for part in parts]).float()
        self.between.addmm_(own.T, own)
        return _Joined(torch.cat(parts) if self.sizes else d, d, left, full)

    def start(self, more: _Joined) -> list[Future[None]]:
        """Add what was joined, strip by strip; what was added before must be finished."""
        return [self.pool.start(partial(self._strip, more, columns)) for columns in self.strips]

    def _center(self, sample: Sample, d: Tensor) -> None:
        """`d = x − c` of one row, counted in what is common."""
        passes, x, (center, left) = _passes(), sample.x, torch.zeros(2, self.size)
        if not len(x):
            return
        some = x[::_EVERY]
        passes.add_rows(some, center)
        # As it is taken off, in 16 bits.
        center = (center / len(some)).to(x.dtype)
        passes.subtract(x, center, d, left)
        self.common.centers.append(center.float())
        self.common.lefts.append(left)
        self.common.counts.append(len(x))
        for name in self.others:
            values = getattr(sample, name)
            total = torch.zeros(values.shape[1])
            passes.add_rows(values, total)
            self.common.others.setdefault(name, []).append(total)

    def _strip(self, more: _Joined, columns: slice) -> None:
        own = more.d[:, columns]
        _add(self.hessian[: columns.stop, columns], more.d[:, : columns.stop], own)
        for name, values in more.left.items():
            _add(self.others[name][:, columns], values, own)
        if more.common is not None:
            self._add_common(more.common, columns)
        if self.sizes and len(own):
            sizes = more.x[:, columns].abs()
            self.sum_abs[columns] += sizes.sum(0, dtype=torch.float32)
            self.peak[columns] = torch.maximum(self.peak[columns], sizes.amax(0))

    def _add_common(self, common: _Common, columns: slice) -> None:
        """What the centers contribute to some columns of the sums."""
        if not common.counts:
            return
        first, second = common.factors()
        self.hessian[: columns.stop, columns].addmm_(first[:, : columns.stop].T, second[:, columns])
        for name, totals in common.others.items():
            self.others[name][:, columns].addmm_(torch.stack(totals).T, first[: len(totals), columns])

    def means(self) -> Moments:
        """The sums over the tokens, divided by their number."""
        count = max(self.tokens, 1)
        self.pool.map(partial(self._finish, count), self.strips)
        if self.loud is not None and len(self.loud):
            self.hessian[self.loud[:, None], self.loud] = self.between / count
        mean_abs, peak = (self.sum_abs / count, self.peak) if self.sizes else (None, None)
        drift, target = self.others.get("drift"), self.others.get("target")
        return Moments(self.tokens, self.hessian, drift, target, mean_abs, peak, self.rounded)

    def _finish(self, count: int, columns: slice) -> None:
        """Sums of some columns to means; what lies above H's diagonal blocks is mirrored below them."""
        self._add_common(self.common, columns)
        self.hessian[: columns.stop, columns].div_(count)
        for total in self.others.values():
            total[:, columns].div_(count)
        block = self.hessian[columns, columns].triu()
        self.hessian[columns, columns] = block + block.triu(1).T
        self.hessian[columns, : columns.start] = self.hessian[: columns.start, columns].T


def _passes() -> Any:
    """The compiled passes over 16-bit rows, which only such rows wait for."""
    from qwen3_export.model import passes

    return passes


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += leftᵀ right` in fp32; bf16 numbers are multiplied as such and the products of some tokens rounded, but
    where there are few tokens, whose roundings would not average out."""
    if left.dtype == torch.float32 or len(left) < _TOKENS:
        total.addmm_(left.float().T, right.float())
        return
    for some, others in zip(torch.split(left, _TOKENS), torch.split(right, _TOKENS), strict=True):
        total.add_(some.T @ others)
