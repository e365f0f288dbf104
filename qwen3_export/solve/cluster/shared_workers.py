"""A pool of threads that shares work with other processes, through files.

    for each shared piece of work:      ask the board ─▶ work on what it gives, leave a file for each piece, ask again
                                        all are done  ─▶ read the files of the pieces that others did

Every worker runs the same block loop, so all come to the same pieces in the same order, and number them alike. A piece
whose file exists is not done again: that is how a worker catches up that was lost, or a whole run that was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.cluster.part_files import read_parts, write_parts

Item = TypeVar("Item")
# `more(key, count, done, evenly)` of `cluster.board`, for one worker.
More = Callable[[str, int, Sequence[int], bool], list[int]]


class SharedWorkers(Workers):
    """See the module docstring.

    Until `begin` is called, and inside a piece of shared work, all is done here.
    """

    def __init__(self, pool: Workers, more: More) -> None:
        super().__init__(pool.threads, pool.matmul_dtype, pool.int_matmul)
        self._more, self._folder, self._number, self._inside = more, Path(), 0, True

    def begin(self, folder: Path) -> None:
        """From now on, share work by way of files in `folder`."""
        self._folder, self._number, self._inside = folder, 0, False

    @property
    def is_shared(self) -> bool:
        """See `Workers`."""
        return not self._inside

    def share(
        self, label: str, items: Sequence[Item], work: Callable[[Sequence[Item]], None],
        give: Callable[[Item], Parts], take: Callable[[Item, Parts], None], evenly: bool = False,
    ) -> None:  # fmt: skip
        """See `Workers`."""
        if self._inside:
            work(items)
            return
        key, self._number = f"{self._number:05d}-{label}", self._number + 1
        files = [self._folder / f"{key}-{place}.part" for place in range(len(items))]
        mine, report = set[int](), [place for place, file in enumerate(files) if file.exists()]
        while given := self._more(key, len(items), report, evenly):
            self._inside = True
            try:
                work([items[place] for place in given])
            finally:
                self._inside = False
            for place in given:
                write_parts(files[place], give(items[place]))
            mine.update(given)
            report = given
        for place, file in enumerate(files):
            if place not in mine:
                take(items[place], read_parts(file))


@contextmanager
def shared(pool: AbstractContextManager[Workers], more: More) -> Iterator[SharedWorkers]:
    """The same threads, sharing their work."""
    with pool as own:
        yield SharedWorkers(own, more)
