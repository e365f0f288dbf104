"""Threads for pieces of work, and parts of them for work side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Threads:
    """`count` threads of a pool, each of which calls `prepare` before it works."""

    pool: ThreadPoolExecutor
    count: int
    prepare: Callable[[], None] = lambda: None


class ThreadsApart:
    """Some threads for one of several things that are worked on side by side.

    A single thread does all at once that it is asked for. After `stop` nothing new is begun.
    """

    def __init__(self, pool: ThreadPoolExecutor | None, stop: threading.Event) -> None:
        self._pool, self._stop = pool, stop

    @classmethod
    def of(cls, threads: Threads, count: int, stop: threading.Event, stack: ExitStack) -> ThreadsApart:
        """`count` threads, which end with the stack."""
        if count < 2:
            return cls(None, stop)
        return cls(stack.enter_context(ThreadPoolExecutor(count, initializer=threads.prepare)), stop)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """As that of an executor."""
        if self._pool is not None and not self._stop.is_set():
            return self._pool.submit(function, *arguments)
        future: Future[Result] = Future()
        if self._stop.is_set():
            future.cancel()
            # Without this, `wait` would wait for it.
            future.set_running_or_notify_cancel()
            return future
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


def results(futures: list[Future[Result]], stop: threading.Event | None = None) -> list[Result]:
    """What they found, in their order.

    The first exception is raised, the rest is cancelled, and `stop` is set.
    """
    try:
        return [future.result() for future in futures]
    except BaseException:
        if stop is not None:
            stop.set()
        for future in futures:
            future.cancel()
        # What still runs may write to files that the caller is about to close.
        wait(futures)
        raise
