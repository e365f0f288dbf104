"""Parallel work whose result does not depend on the number of threads.

Torch splits one operation over threads and may then add in another order. Here every operation runs
on one thread, and whole pieces of work, cut the same way on every machine, run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads; see `workers`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items; the first exception is raised, the rest is cancelled."""
        futures = [self._pool.submit(torch.no_grad()(function), item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            # What still runs may write to files that the caller is about to close.
            wait(futures)
            raise


@contextmanager
def workers(threads: int | None = None) -> Iterator[Workers]:
    """Yield a pool of `threads` (default: the processors that this process may use)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    count = threads or len(os.sched_getaffinity(0))
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Workers(pool)
    finally:
        torch.set_num_threads(before)
