"""Moments of one linear's inputs: means over all calibration tokens that reach it.

    hessian   mean x xᵀ         [in, in]   x: its inputs in the quantized model so far
    drift     mean (x̃ − x) xᵀ   [in, in]   x̃: the same inputs in the original model
    target    mean t xᵀ         [out, in]  t: the output that it should have, where that is known
    mean_abs  mean |x|          [in]
    peak      max |x|           [in]

Sums are made in strips of columns, which `calibration.collect` shares between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.calibration.gram_int8 import Bytes, add_products, as_bytes

_STRIP = 256
# Sums over fewer tokens than this are made in fp32.
_TOKENS = 2048
# Contributions of so many centers are added at a time.
_CENTERS = 128


@dataclass(frozen=True)
class SampleInputs:
    """One sample's inputs `[n, in]`, their drift `[n, in]`, and the target `[n, out]`.

    The drift is the difference of the original's inputs and these.
    """

    x: Tensor
    drift: Tensor | None = None
    target: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Moments over `tokens` tokens; see the module docstring.

    `drift` or `target` are there only where the original ran beside, magnitudes only where asked for.
    """

    tokens: int
    hessian: Tensor
    drift: Tensor | None = None
    target: Tensor | None = None
    mean_abs: Tensor | None = None
    peak: Tensor | None = None

    def join(self, other: Moments) -> Moments:
        """Moments over both sets of tokens, None where one set lacks them."""
        total = max(self.tokens + other.tokens, 1)

        def mean(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, other.tokens / total)

        hessian = torch.lerp(self.hessian, other.hessian, other.tokens / total)
        drift, target = mean(self.drift, other.drift), mean(self.target, other.target)
        peak = None if self.peak is None or other.peak is None else torch.maximum(self.peak, other.peak)
        mean_abs = mean(self.mean_abs, other.mean_abs)
        return Moments(self.tokens + other.tokens, hessian, drift, target, mean_abs, peak)


@dataclass
class PairedMoments:
    """Moments of the samples that run through both models.

    `fitted` are most of them, `held_out` every eighth, `both` all together; None where they are joined when needed.
    """

    fitted: Moments
    held_out: Moments
    both: Moments | None = None

    def joined(self) -> Moments:
        """Those of all samples together."""
        return self.fitted.join(self.held_out) if self.both is None else self.both

    def release(self) -> None:
        """Let go of all moments, which are the largest matrices of a wide linear."""
        del self.fitted, self.held_out, self.both


def strip_pairs(width: int) -> list[tuple[slice, ...]]:
    """All column strips, a long one with a short one.

    A pair costs as much as any other.
    """
    strips = [slice(i, min(i + _STRIP, width)) for i in range(0, width, _STRIP)]
    half = len(strips) // 2
    pairs = [(strips[i], strips[-1 - i]) for i in range(half)]
    return [*pairs, (strips[half],)] if len(strips) % 2 else [*pairs]


@dataclass(frozen=True)
class _Common:
    """Contributions of some samples' centers to the sums; see `calibration.gram_int8`.

    For each sample: its center c, Σ d̂, its number of tokens, and Σ t of the drift or target t.
    """

    centers: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    others: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, x: Bytes, counts: list[int], left: dict[str, Bytes]) -> None:
        self.centers.append(x.centers)
        self.sums.append(x.sums)
        self.counts.extend(counts)
        for name, values in left.items():
            self.others.setdefault(name, []).append(values.sums)

    def contribute(self, hessian: Tensor, others: dict[str, Tensor], columns: slice) -> None:
        """Add the contributions of the centers to some columns of the sums."""
        if not self.counts:
            return
        c, d = torch.cat(self.centers), torch.cat(self.sums)
        count = torch.tensor(self.counts, dtype=c.dtype)[:, None]
        first, second = torch.cat([c, d]), torch.cat([count * c + d, c])
        hessian[: columns.stop, columns].addmm_(first[:, : columns.stop].T, second[:, columns])
        for name, totals in self.others.items():
            others[name][:, columns].addmm_(torch.cat(totals).T, c[:, columns])


@dataclass(frozen=True)
class JoinedInputs:
    """Inputs of some samples, and their drift or target, in fp32 or bytes.

    `magnitudes` are the unrounded inputs, where mean and max |x| are wanted. `common` is set only when the
    contributions of many centers are due.
    """

    x: Any
    left: dict[str, Any]
    magnitudes: Tensor | None = None
    common: _Common | None = None


class MomentSums:
    """Sums over the samples so far, of fp32 inputs or of bytes.

    Inputs in 16 bits, and others that may be rounded, are summed as bytes (`gram_int8`), unless there are too few
    tokens for that to be faster.
    """

    def __init__(self, width: int, device: str, pool: Workers, magnitudes: bool, int_matmul: bool) -> None:
        self.int_matmul = int_matmul
        self.width, self.device, self.pool, self.magnitudes, self.tokens = width, device, pool, magnitudes, 0
        self.hessian = torch.zeros(width, width, device=device)
        self.sum_abs, self.peak = (torch.zeros(width, device=device) for _ in range(2))
        self.others = dict[str, Tensor]()
        self.common = _Common()

    def begin(self) -> None:
        """Count from the first sample.

        Sums of strips that were added up before are kept.
        """
        self.tokens, self.common = 0, _Common()

    def join(self, batch: list[SampleInputs]) -> JoinedInputs:
        """Join a few more samples in one matrix, and count their tokens."""
        parts = [item.x for item in batch]
        given = [name for name in ("drift", "target") if batch and getattr(batch[0], name) is not None]
        left = {name: [getattr(item, name) for item in batch] for name in given}
        added = sum(map(len, parts))
        self.tokens += added
        for name, values in left.items():
            self._other(name, values[0].shape[1])
        if (parts[0].dtype == torch.float32 and not self.int_matmul) or added < _TOKENS:
            x = torch.cat(parts)
            return JoinedInputs(
                x.float(),
                {name: torch.cat(values).float() for name, values in left.items()},
                x if self.magnitudes else None,
            )
        magnitudes, full = torch.cat(parts) if self.magnitudes else None, None
        if len(self.common.counts) >= _CENTERS:
            full, self.common = self.common, _Common()
        rounded = as_bytes(parts, centered=True)
        others = {name: as_bytes(values, centered=False) for name, values in left.items()}
        self.common.add(rounded, [len(part) for part in parts], others)
        return JoinedInputs(rounded, others, magnitudes, full)

    def _other(self, name: str, rows: int) -> Tensor:
        """The sums of drift or target `[rows, in]`."""
        if name not in self.others:
            self.others[name] = torch.zeros(rows, self.width, device=self.device)
        return self.others[name]

    def start(self, more: JoinedInputs, strips: Sequence[slice]) -> list[Future[None]]:
        """Add what was joined, strip by strip; what was added before must be finished."""
        return [self.pool.start(partial(self._strip, more, columns)) for columns in strips]

    def end(self, strips: Sequence[slice]) -> None:
        """Add what the last centers contribute."""
        self.pool.map(partial(self.common.contribute, self.hessian, self.others), strips)

    def dump(self, columns: slice) -> Parts:
        """The sums of one strip, for another process."""
        others = {name: total[:, columns] for name, total in self.others.items()}
        sizes = {"sum_abs": self.sum_abs[columns], "peak": self.peak[columns]} if self.magnitudes else {}
        return {"tokens": self.tokens, "hessian": self.hessian[: columns.stop, columns], "others": others, **sizes}

    def load(self, columns: slice, given: Parts) -> None:
        """Sums of one strip from another process."""
        self.tokens = given["tokens"]
        self.hessian[: columns.stop, columns] = given["hessian"].to(self.device)
        for name, total in given["others"].items():
            self._other(name, len(total))[:, columns] = total.to(self.device)
        if self.magnitudes:
            self.sum_abs[columns], self.peak[columns] = (given[key].to(self.device) for key in ("sum_abs", "peak"))

    def _strip(self, more: JoinedInputs, columns: slice) -> None:
        _add(self.hessian, more.x, more.x, slice(0, columns.stop), columns)
        for name, values in more.left.items():
            total = self.others[name]
            _add(total, values, more.x, slice(0, len(total)), columns)
        if more.common is not None:
            more.common.contribute(self.hessian, self.others, columns)
        if more.magnitudes is not None and len(more.magnitudes):
            magnitudes = more.magnitudes[:, columns].abs()
            self.sum_abs[columns] += magnitudes.sum(0, dtype=torch.float32)
            self.peak[columns] = torch.maximum(self.peak[columns], magnitudes.amax(0))

    def means(self) -> Moments:
        """The sums over the tokens, divided by their number."""
        count = max(self.tokens, 1)
        strips = [strip for pair in strip_pairs(self.width) for strip in pair]
        self.pool.map(partial(self._finish, count), sorted(strips, key=lambda strip: -strip.stop))
        mean_abs, peak = (self.sum_abs / count, self.peak) if self.magnitudes else (None, None)
        drift, target = self.others.get("drift"), self.others.get("target")
        return Moments(self.tokens, self.hessian, drift, target, mean_abs, peak)

    def _finish(self, count: int, columns: slice) -> None:
        """Turn the sums of some columns into means.

        H was summed above the diagonal only; its mirror image is filled in here.
        """
        self.hessian[: columns.stop, columns].div_(count)
        for total in self.others.values():
            total[:, columns].div_(count)
        block = self.hessian[columns, columns].triu()
        self.hessian[columns, columns] = block + block.triu(1).T
        self.hessian[columns, : columns.start] = self.hessian[: columns.start, columns].T


def _add(total: Tensor, left: Any, right: Any, indices: slice, columns: slice) -> None:
    """`total[indices, columns] += leftᵀ right`, both in fp32 or both in bytes."""
    if isinstance(left, Bytes):
        add_products(total, left, right, indices, columns)
    else:
        total[indices, columns].addmm_(left[:, indices].T, right[:, columns])
