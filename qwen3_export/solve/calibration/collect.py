"""Moments of calibration samples, collected by many threads, or by workers on a cluster.

Threads work on different strips of columns, and each strip adds the samples in their order. So the sums do not depend
on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from qwen3_export.model.threads import results
from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.calibration.moments import Moments, MomentSums, SampleInputs, strip_pairs


def collect_moments(
    read: Callable[[int], SampleInputs], indices: Sequence[int], at_once: int, width: int, device: str, pool: Workers,
    magnitudes: bool = True, int_matmul: bool = False,
) -> Moments:  # fmt: skip
    """Moments of `width` inputs over the samples `indices`.

    `at_once` samples are in memory while as many are being read. `magnitudes` says whether mean |x| and max |x| are
    wanted too, which takes a tenth of the time of the Hessian; `int_matmul`, whether fp32 inputs may be rounded to
    bytes for their sums, as bf16 inputs are.
    """
    return collect_moments_of_parts([(read, indices)], at_once, width, device, pool, magnitudes, int_matmul)[0]


def collect_moments_of_parts(
    parts: Sequence[tuple[Callable[[int], SampleInputs], Sequence[int]]], at_once: int, width: int, device: str,
    pool: Workers, magnitudes: bool = True, int_matmul: bool = False,
) -> list[Moments]:  # fmt: skip
    """Moments over several sets of samples, one set after another.

    Each set has its own reader; see `collect_moments`.
    """
    found = [MomentSums(width, device, pool, magnitudes, int_matmul) for _ in parts]
    cuts = [
        (sums, read, indices[begin : begin + at_once])
        for sums, (read, indices) in zip(found, parts, strict=True)
        for begin in range(0, len(indices), at_once)
    ]

    def add(pairs: Sequence[tuple[slice, ...]]) -> None:
        # The longest first, so that the processors finish together.
        strips = sorted((strip for pair in pairs for strip in pair), key=lambda strip: -strip.stop)
        _add_all(cuts, found, strips, pool)

    def dump(pair: tuple[slice, ...]) -> Parts:
        return {f"{i}.{strip.start}": sums.dump(strip) for i, sums in enumerate(found) for strip in pair}

    def load(pair: tuple[slice, ...], given: Parts) -> None:
        for i, sums in enumerate(found):
            for strip in pair:
                sums.load(strip, given[f"{i}.{strip.start}"])

    pool.share("moments", strip_pairs(width), add, dump, load, evenly=True)
    return [sums.means() for sums in found]


def _add_all(
    cuts: Sequence[tuple[MomentSums, Callable[[int], SampleInputs], Sequence[int]]], found: Sequence[MomentSums],
    strips: Sequence[slice], pool: Workers,
) -> None:  # fmt: skip
    """Sum up some column strips over all samples."""

    def ask(number: int) -> list[Future[SampleInputs]]:
        return [pool.start(partial(cuts[number][1], index)) for index in cuts[number][2]] if number < len(cuts) else []

    for sums in found:
        sums.begin()
    coming, adding = ask(0), list[Future[None]]()
    for number, (sums, _, _) in enumerate(cuts):
        # The next samples are requested first, so that all processors have work while these are joined.
        batch, coming = results(coming), ask(number + 1)
        joined = sums.join(batch)
        results(adding)
        adding = sums.start(joined, strips)
    results(adding)
    for sums in found:
        sums.end(strips)
