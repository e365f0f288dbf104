"""Which piece of shared work is whose.

The board is an object in a process of its own, which all workers ask.

    share "0007-rows", 16 pieces        done 0 1 2 3 · given to worker 2: 4 5 · free 6 … 15

A worker reports what it has done and is given more, until all pieces are done. Pieces of a worker that was lost are
free again. The board is no record: what is done lies in files, and whoever comes back reports the files it sees.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class _Share:
    """Pieces of one shared piece of work."""

    done: set[int] = field(default_factory=set)
    given: dict[int, int] = field(default_factory=dict)


class Board:
    """See the module docstring.

    Its methods are coroutines: many workers wait in `more` at a time.
    """

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._arrived: dict[str, set[int]] = {}
        self._workers, self._finished = 1, 0
        self._changed = asyncio.Condition()

    async def begin(self, workers: int) -> None:
        """Forget all shares; so many workers will ask."""
        async with self._changed:
            self._shares, self._arrived, self._workers = {}, {}, workers

    async def barrier(self, key: str, worker: int) -> None:
        """Wait until all workers have come to the same place."""
        async with self._changed:
            self._arrived.setdefault(key, set()).add(worker)
            self._changed.notify_all()
            while len(self._arrived[key]) < self._workers:
                await self._changed.wait()

    async def finished(self) -> int:
        """How many pieces were reported as done so far, ever."""
        return self._finished

    async def lost(self, worker: int) -> None:
        """What was given to a worker is free again."""
        async with self._changed:
            for share in self._shares.values():
                share.given = {piece: owner for piece, owner in share.given.items() if owner != worker}
            self._changed.notify_all()

    async def more(
        self, key: str, count: int, worker: int, done: Collection[int], evenly: bool, least: int
    ) -> list[int]:
        """Pieces for a worker that has done some.

        There are none when all `count` of the share `key` are done.

        `evenly`: its whole part at once; otherwise fewer and fewer, but `least` at a time, so that all end together.
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
