"""The board: assigns the pieces of shared work to workers.

It is an actor in a process of its own, which all workers call.

    share "0007-rows", 16 pieces        done 0 1 2 3 · given to worker 2: 4 5 · free 6 … 15

A worker reports the pieces it has done and is given more, until all are done. The pieces of a lost worker become free
again. The board keeps nothing on disk: results lie in files, and a restarted worker reports the files it finds.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class _Share:
    """The pieces of one shared task: those done, and those given to which worker."""

    done: set[int] = field(default_factory=set)
    given: dict[int, int] = field(default_factory=dict)


class Board:
    """The board's actor; its methods are coroutines, since many workers wait at once."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._arrived: dict[str, set[int]] = {}
        self._workers, self._finished, self._calm = 1, 0, False
        self._changed = asyncio.Condition()

    async def begin(self, workers: int, is_calm: bool = False) -> None:
        """Forget all shares, and expect so many workers; see `calm`."""
        async with self._changed:
            self._shares, self._arrived, self._workers, self._calm = {}, {}, workers, is_calm

    async def calm(self) -> bool:
        """Whether nobody else can have a hand in the files.

        That is so until one of them is lost, unless there were others before.
        """
        return self._calm

    async def barrier(self, key: str, worker: int) -> None:
        """Wait until all workers have called with this key."""
        async with self._changed:
            self._arrived.setdefault(key, set()).add(worker)
            self._changed.notify_all()
            while len(self._arrived[key]) < self._workers:
                await self._changed.wait()

    async def finished(self) -> int:
        """Number of pieces reported as done since the board was made."""
        return self._finished

    async def lost(self, worker: int) -> None:
        """Free the pieces that were given to a lost worker."""
        async with self._changed:
            self._calm = False
            for share in self._shares.values():
                share.given = {piece: owner for piece, owner in share.given.items() if owner != worker}
            self._changed.notify_all()

    async def more(
        self, key: str, count: int, worker: int, done: Collection[int], evenly: bool, least: int
    ) -> list[int]:
        """Next pieces for a worker that reports `done` ones; none when all are done.

        `evenly` gives a worker its whole part at once. Otherwise parts become smaller, down to `least` pieces, so that
        all workers finish at about the same time.
        """
        async with self._changed:
            share = self._shares.setdefault(key, _Share())
            if fresh := {*done} - share.done:
                share.done |= fresh
                self._finished += len(fresh)
                self._changed.notify_all()
            while len(share.done) < count:
                free = [piece for piece in range(count) if piece not in share.done and piece not in share.given]
                if free:
                    part = math.ceil(count / self._workers) if evenly else math.ceil(len(free) / (2 * self._workers))
                    given = free[: part if evenly else max(part, least)]
                    share.given.update(dict.fromkeys(given, worker))
                    return given
                await self._changed.wait()
            return []
