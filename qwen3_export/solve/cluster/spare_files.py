"""Files that workers of a cluster write over together.

They lie on a path that all of them see.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qwen3_export.solve.calibration.activations import SpareFiles


class SharedSpareFiles(SpareFiles):
    """The spare of all workers of a block; see `SpareFiles`.

        put     path ─▶ spare/SIZE-NAME              by the first worker that comes; the others find nothing
        find    spare/SIZE-NAME ─▶ spare/NAME.taken ─▶ a link at the new path, unless another worker was faster

    `is_calm` says whether no worker was lost since the block began. A lost worker may still write to the files it had
    open, so from then on files are deleted, not put on the spare.
    """

    def __init__(self, folder: Path, is_calm: Callable[[], bool]) -> None:
        self._folder, self._is_calm = folder, is_calm
        folder.mkdir(exist_ok=True)

    def put(self, path: Path) -> None:
        """Take a file in, if no other worker has."""
        with suppress(FileNotFoundError):
            if self._is_calm():
                path.rename(self._folder / f"{path.stat().st_size}-{uuid.uuid4().hex}")
            else:
                path.unlink()

    def find(self, path: Path, size: int) -> None:
        """Bring a file of so many bytes to `path`.

        Nothing happens where there is none, or where another worker has brought one.
        """
        for spare in sorted(self._folder.glob(f"{size}-*")):
            if path.exists():
                return
            taken = self._folder / f"{uuid.uuid4().hex}.taken"
            try:
                spare.rename(taken)
            except FileNotFoundError:
                continue  # Another worker has taken it.
            try:
                os.link(taken, path)
            except FileExistsError:
                taken.rename(spare)
            else:
                taken.unlink()
            return
