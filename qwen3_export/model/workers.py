"""Parallel work whose result does not depend on the number of threads.

Torch splits one operation over threads and may then add in another order. Here every operation runs
on one thread, and whole pieces of work, cut the same way on every machine, run side by side.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

# Parameters of glibc's mallopt; 32 MiB is the most that it takes for the second.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
_LARGEST_IN_HEAP, _KEPT = 32 << 20, 1 << 30
Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads; see `workers`. `products` is the type in which this processor multiplies fastest
    what need not be exact: the calibration rows on their way through the model."""

    def __init__(self, pool: ThreadPoolExecutor, products: torch.dtype = torch.float32) -> None:
        self._pool = pool
        self.products = products

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items; the first exception is raised, the rest is cancelled."""
        return results([self._pool.submit(torch.no_grad()(function), item) for item in items])

    def start(self, function: Callable[[], Result]) -> Future[Result]:
        """One piece of work beside what follows; it must not wait for the pool itself."""
        return self._pool.submit(torch.no_grad()(function))


def results(futures: list[Future[Result]]) -> list[Result]:
    """What they found, in their order; the first exception is raised, the rest is cancelled."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        # What still runs may write to files that the caller is about to close.
        wait(futures)
        raise


# Largest error of a product that `fast` accepts, relative to its largest element; fp32 itself has about 4e-7.
FAST_BOUND = 4e-6


@contextmanager
def workers(threads: int | None = None, fast: bool = False) -> Iterator[Workers]:
    """Yield a pool of `threads` (default: the processors that this process may use).

    `fast` lets fp32 products be computed as sums of bf16 products where the processor does those
    faster and the result stays within `FAST_BOUND`, which is tried out first.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    precision = products.fp32_precision if products else None
    if fast and products:
        products.fp32_precision = "bf16"
        if _product_error() > FAST_BOUND:
            products.fp32_precision = precision
    _keep_memory()
    count = threads or len(os.sched_getaffinity(0))
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Workers(pool, torch.bfloat16 if fast and has_bf16() else torch.float32)
    finally:
        torch.set_num_threads(before)
        if products:
            products.fp32_precision = precision


def has_bf16() -> bool:
    """Whether this processor has instructions that multiply bf16 numbers and add up in fp32."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _product_error() -> float:
    """Largest error of a product of this size, relative to the largest element of the exact one."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float((left @ right.T - exact).abs().max() / exact.abs().max())


def _keep_memory() -> None:
    """Let all threads allocate from one heap that keeps what is freed, where the C library is glibc.

    With a heap each, what one thread frees no other can use: a sparse block took 2.6 times the memory
    of what was alive in it. Pages that are given back and taken again cost more than the work on them:
    `give_back` gives them back where nothing is at hand that the next step could use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc: between blocks, so that what is
    scattered over the heap does not add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
