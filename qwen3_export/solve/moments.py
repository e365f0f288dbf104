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
from dataclasses import dataclass
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
class _Joined:
    """Some rows' inputs, less what they have in common, and what they are multiplied with besides themselves."""

    x: Tensor
    d: Tensor
    left: dict[str, Tensor]


class _Sums:
    """Sums over the samples so far.

    Products in bf16 are rounded to 16 bits before they are added up, which would be as large as the damping where all
    inputs have much in common. So d = x − c is summed, c being the mean of the first rows, and what c contributes is
    added in fp32:  Σ x xᵀ = Σ d dᵀ + c (Σ d)ᵀ + (Σ d) cᵀ + n c cᵀ. What a few inputs that are much larger than the
    others have in common, as those that a first token makes, is harmful still: the sums between these `loud` ones are
    made once more in fp32.
    """

    def __init__(self, size: int, device: str, pool: Workers, sizes: bool) -> None:
        self.size, self.device, self.pool, self.sizes, self.tokens = size, device, pool, sizes, 0
        length = _STRIP if size > 2 * _STRIP else _STRIP // 2
        # The longest first, so that the processors finish together.
        self.strips = [slice(i, min(i + length, size)) for i in range(0, size, length)][::-1]
        self.hessian = torch.zeros(size, size, device=device)
        self.sum_abs, self.peak, self.sum = (torch.zeros(size, device=device) for _ in range(3))
        self.others, self.sums = dict[str, Tensor](), dict[str, Tensor]()
        self.center: Tensor | None = None
        self.loud = torch.zeros(0, dtype=torch.int64, device=device)
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
                self.sums[name] = torch.zeros(values.shape[1], device=self.device)
        if parts[0].dtype == torch.float32 or not added:
            x = torch.cat(parts)
            return _Joined(x, x, left)
        passes, d = _passes(), self._centered(parts)
        for name, values in left.items():
            passes.add_rows(values, self.sums[name])
        own = torch.cat([part[:, self.loud] for part in parts]).float()
        self.between.addmm_(own.T, own)
        return _Joined(torch.cat(parts) if self.sizes else d, d, left)

    def start(self, more: _Joined) -> list[Future[None]]:
        """Add what was joined, strip by strip; what was added before must be finished."""
        return [self.pool.start(partial(self._strip, more.x, more.d, more.left, columns)) for columns in self.strips]

    def _centered(self, parts: list[Tensor]) -> Tensor:
        """`x − c`, counted in its sum; c, and which inputs are loud, are told by the first rows."""
        passes = _passes()
        if self.center is None:
            total, energy = (torch.zeros(self.size) for _ in range(2))
            for part in parts:
                passes.add_rows(part, total)
            self.center = (total / sum(map(len, parts))).to(parts[0].dtype)
            for part in parts:
                energy += (part - self.center).float().square().sum(0)
            self.loud = (energy > _LOUD * energy.mean()).nonzero().flatten()
            self.between = torch.zeros(len(self.loud), len(self.loud), device=self.device)
        d = torch.empty(sum(map(len, parts)), self.size, dtype=parts[0].dtype)
        for part, rows in zip(parts, torch.split(d, [len(part) for part in parts]), strict=True):
            passes.subtract(part, self.center, rows, self.sum)
        return d

    def _strip(self, x: Tensor, d: Tensor, left: dict[str, Tensor], columns: slice) -> None:
        own = d[:, columns]
        _add(self.hessian[: columns.stop, columns], d[:, : columns.stop], own)
        for name, values in left.items():
            _add(self.others[name][:, columns], values, own)
        if self.sizes and len(own):
            sizes = x[:, columns].abs()
            self.sum_abs[columns] += sizes.sum(0, dtype=torch.float32)
            self.peak[columns] = torch.maximum(self.peak[columns], sizes.amax(0))

    def means(self) -> Moments:
        """The sums over the tokens, divided by their number."""
        count = max(self.tokens, 1)
        self.sum.div_(count)
        self.pool.map(partial(self._finish, count), self.strips)
        if len(self.loud):
            self.hessian[self.loud[:, None], self.loud] = self.between / count
        mean_abs, peak = (self.sum_abs / count, self.peak) if self.sizes else (None, None)
        drift, target = self.others.get("drift"), self.others.get("target")
        return Moments(self.tokens, self.hessian, drift, target, mean_abs, peak, self.center is not None)

    def _finish(self, count: int, columns: slice) -> None:
        """Sums of some columns to means; what lies above H's diagonal blocks is mirrored below them."""
        upper = self.hessian[: columns.stop, columns].div_(count)
        if self.center is not None:
            # What c contributes: c mᵀ + m cᵀ + c cᵀ, m being the mean of d.
            center, mean = self.center.float(), self.sum
            upper.addr_(center[: columns.stop], (mean + center)[columns])
            upper.addr_(mean[: columns.stop], center[columns])
        for name, total in self.others.items():
            total[:, columns].div_(count)
            if self.center is not None:
                total[:, columns].addr_(self.sums[name] / count, self.center[columns].float())
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
