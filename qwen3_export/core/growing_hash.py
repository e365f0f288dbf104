"""SHA-256 of a file that is still being written.

    writer   ───────── write ──────── write ─────▶ end
    hash        ─ read, digest, to the disk ─ read, digest, to the disk ─▶

A thread follows the writer: it reads new bytes from the page cache and flushes them to the disk. When the last byte is
written, hash and flush are almost done.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from qwen3_export.core.manifest import beside

_PIECE = 4 << 20
# Bytes from one flush to the next.
_FLUSHED = 64 << 20


class GrowingHash:
    """The hash of the existing file `path`, which only grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._complete = path, 0, False
        self._changed = threading.Condition()
        self._digest = beside(self._follow)

    def wrote(self, end: int) -> None:
        """Tell that the file's bytes up to `end` will not change any more."""
        with self._changed:
            self._written = end
            self._changed.notify()

    def finish(self) -> None:
        """Tell that nothing more will be written."""
        with self._changed:
            self._complete = True
            self._changed.notify()

    def result(self) -> str:
        """Hex digest of the whole file; call `finish` first.

        Raises the error of a failed read or flush.
        """
        return self._digest.result()

    def _follow(self) -> str:
        digest, position, flushed = hashlib.sha256(), 0, 0
        buffer = memoryview(bytearray(_PIECE))
        with self._path.open("rb", buffering=0) as file:
            while end := self._available(position):
                while position < end and (count := file.readinto(buffer[: end - position])):
                    digest.update(buffer[:count])
                    position += count
                if position - flushed >= _FLUSHED:
                    os.fdatasync(file.fileno())
                    flushed = position
        return digest.hexdigest()

    def _available(self, position: int) -> int:
        """Wait for bytes beyond `position`; their end, 0 when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._written > position or self._complete)
            return self._written if self._written > position else 0
