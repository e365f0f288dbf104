"""A pool of threads that shares its work with other processes, through files.

    for each shared task:   ask the board ─▶ work on the pieces it gives, write a file for each, ask again
                            all are done  ─▶ read the files of the pieces that others did

Every worker runs the same block loop, so all reach the same tasks in the same order and give them the same numbers. A
piece whose file exists is not done again: so a restarted worker, or a run that was stopped, catches up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.cluster.part_files import read_parts, write_parts

Item = TypeVar("Item")
# One worker's call of `Board.more`: (key, count, done, evenly) → pieces.
More = Callable[[str, int, Sequence[int], bool], list[int]]


@dataclass
class Spent:
    """Seconds and bytes that this process spent on one kind of shared work."""

    working: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    reading: float = 0.0
    bytes_written: int = 0
    bytes_read: int = 0
    pieces: int = 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a `with` block to one field."""
        started = time.monotonic()
        yield
        setattr(self, what, getattr(self, what) + time.monotonic() - started)


class SharedWorkers(Workers):
    """The pool of a cluster's worker.

    Before `begin`, and inside a piece of shared work, it does everything in this process.
    """

    def __init__(self, pool: Workers, more: More, barrier: Callable[[str], None]) -> None:
        super().__init__(pool.threads, pool.matmul_dtype, pool.int_matmul)
        self._more, self._barrier, self._folder, self._number, self._inside = more, barrier, Path(), 0, True
        self.spent: dict[str, Spent] = {}

    def begin(self, folder: Path) -> None:
        """Share all work from now on, through files in `folder`."""
        self._folder, self._number, self._inside = folder, 0, False

    @property
    def is_shared(self) -> bool:
        """See `Workers`."""
        return not self._inside

    def barrier(self) -> None:
        """See `Workers`."""
        if not self._inside:
            self._number += 1
            self._barrier(f"{self._number:05d}")

    def share(
        self, label: str, items: Sequence[Item], work: Callable[[Sequence[Item]], None],
        dump: Callable[[Item], Parts], load: Callable[[Item, Parts], None], evenly: bool = False,
    ) -> None:  # fmt: skip
        """See `Workers`."""
        if self._inside:
            work(items)
            return
        key, self._number = f"{self._number:05d}-{label}", self._number + 1
        files = [self._folder / f"{key}-{place}.part" for place in range(len(items))]
        mine, report = set[int](), [place for place, file in enumerate(files) if file.exists()]
        spent = self.spent.setdefault(label, Spent())
        with spent.timed("waiting"):
            given = self._more(key, len(items), report, evenly)
        while given:
            self._inside = True
            try:
                with spent.timed("working"):
                    work([items[place] for place in given])
            finally:
                self._inside = False
            with spent.timed("writing"):
                spent.bytes_written += sum(write_parts(files[place], dump(items[place])) for place in given)
            mine.update(given)
            with spent.timed("waiting"):
                given = self._more(key, len(items), given, evenly)
        with spent.timed("reading"):
            for place, file in enumerate(files):
                if place not in mine:
                    load(items[place], read_parts(file))
                    spent.bytes_read += file.stat().st_size
        spent.pieces += len(mine)


@contextmanager
def shared(
    pool: AbstractContextManager[Workers], more: More, barrier: Callable[[str], None]
) -> Iterator[SharedWorkers]:
    """A pool's threads as `SharedWorkers`."""
    with pool as own:
        yield SharedWorkers(own, more, barrier)
