"""A cluster without Ray: workers are threads, which can be made to die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest

from qwen3_export.cluster.board import Board
from qwen3_export.cluster.session import LostWorkerError, Node


class Thread:
    """An object with a thread of its own, in place of an actor's process."""

    def __init__(self, session: ThreadSession, thing: Any) -> None:
        self.session, self.thing, self.is_dead = session, thing, False
        self._pool = ThreadPoolExecutor(1)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._pool.submit(self._run, method, arguments)

    def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        self.session.current.thread = self
        if self.is_dead:
            raise LostWorkerError("killed")
        return getattr(self.thing, method)(*arguments)

    def end(self) -> None:
        self.is_dead = True
        self._pool.shutdown()


class BoardThread:
    """The board in a thread with an event loop; it can kill a caller."""

    def __init__(self, session: ThreadSession) -> None:
        self.session, self.board = session, Board()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def ask(self, method: str, *arguments: Any) -> Any:
        if method == "more":
            self.session.strike()
        return asyncio.run_coroutine_threadsafe(getattr(self.board, method)(*arguments), self._loop).result(60)

    def stop(self) -> None:
        """Stop the loop; calls that still wait get no answer."""

        def cancel() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)


class ThreadSession:
    """In place of `cluster.session.RaySession`; `deaths` are the calls that kill their worker."""

    def __init__(self, nodes: int, deaths: Sequence[int], cpus: int) -> None:
        self._count, self._deaths, self._cpus, self.asked = nodes, {*deaths}, cpus, 0
        self.boards: list[BoardThread] = []
        self.current, self._lock = threading.local(), threading.Lock()

    def strike(self) -> None:
        with self._lock:
            self.asked += 1
            dies = self.asked in self._deaths
        thread = self.current.thread
        thread.is_dead |= dies
        if thread.is_dead:
            raise LostWorkerError("killed")

    def end(self, threads: Sequence[Thread]) -> None:
        for thread in threads:
            thread.is_dead = True
        for board in self.boards:
            board.stop()
        for thread in threads:
            thread.end()

    def nodes(self) -> list[Node]:
        return [Node(str(i), f"node {i}", self._cpus, 0, 1 << 40) for i in range(self._count)]

    def place(self, kind: type, arguments: Sequence[Any], *_: Any, **__: Any) -> Any:
        if kind is Board:
            self.boards.append(BoardThread(self))
            return self.boards[-1]
        return Thread(self, kind(*arguments))

    def answers(self, calls: Sequence[Future[Any]], _seconds: float | None = None) -> list[Future[Any]]:
        return list(wait(calls, return_when=FIRST_COMPLETED).done)

    def answer(self, call: Future[Any], _seconds: float | None = None) -> Any:
        return call.result(60)


@contextmanager
def threads_for_nodes(nodes: int, deaths: Sequence[int] = (), cpus: int = 1) -> Iterator[ThreadSession]:
    """Have `--cluster host:1` find so many nodes for a `with` block."""
    session = ThreadSession(nodes, deaths, cpus)

    @contextmanager
    def open_session(*_: Any) -> Iterator[ThreadSession]:
        yield session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_export.solve.cluster.open_session", open_session)
        patch.setattr("qwen3_export.solve.cluster.member.end_with_parent", lambda: None)
        for module in ("quantize", "mixed_precision.search"):
            patch.setattr(f"qwen3_export.solve.{module}.check_cluster", lambda _: None)
        yield session
