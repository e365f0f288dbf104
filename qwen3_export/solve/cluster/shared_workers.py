"""A pool of threads that shares work with other processes, through files.

    for each shared piece of work:      ask the board ─▶ work on what it gives, leave a file for each piece, ask again
                                        all are done  ─▶ read the files of the pieces that others did

Every worker runs the same block loop, so all come to the same pieces in the same order, and number them alike. A piece
whose file exists is not done again: that is how a worker catches up that was lost, or a whole run that was stopped.
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
# `more(key, count, done, evenly)` of `cluster.board`, for one worker.
More = Callable[[str, int, Sequence[int], bool], list[int]]


@dataclass
class Spent:
    """Seconds and bytes of one kind of shared work, in this process."""

    working: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    reading: float = 0.0
    bytes_written: int = 0
    bytes_read: int = 0
    pieces: int = 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of the block."""
        started = time.monotonic()
        yield
        setattr(self, what, getattr(self, what) + time.monotonic() - started)


class SharedWorkers(Workers):
    """See the module docstring.

    Until `begin` is called, and inside a piece of shared work, all is done here.
    """

    def __init__(self, pool: Workers, more: More, barrier: Callable[[str], None]) -> None:
        super().__init__(pool.threads, pool.matmul_dtype, pool.int_matmul)
        self._more, self._barrier, self._folder, self._number, self._inside = more, barrier, Path(), 0, True
        self.spent: dict[str, Spent] = {}

    def begin(self, folder: Path) -> None:
        """From now on, share work by way of files in `folder`."""
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
    """The same threads, sharing their work."""
    with pool as own:
        yield SharedWorkers(own, more, barrier)
