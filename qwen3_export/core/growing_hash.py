"""SHA-256 of a file that is still being written.

    writer   ──── write ──── write ─────▶ end
    hash        ─ read, digest ─ read, digest ─▶
    flush         ──── to the disk ──── to the disk ─▶

Two threads follow the writer: one reads new bytes from the page cache, one flushes them to the disk. When the last
byte is written, hash and flush are almost done.
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
        self._digest, self._flushed = beside(self._hash), beside(self._flush)

    def wrote(self, end: int) -> None:
        """Tell that the file's bytes up to `end` will not change any more."""
        with self._changed:
            self._written = end
            self._changed.notify_all()

    def finish(self) -> None:
        """Tell that nothing more will be written."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def result(self) -> str:
        """Hex digest of the whole file, which is on the disk; call `finish` first.

        Raises the error of a failed read or flush.
        """
        self._flushed.result()
        return self._digest.result()

    def _hash(self) -> str:
        digest, position = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_PIECE))
        with self._path.open("rb", buffering=0) as file:
            while end := self._available(position):
                while position < end and (count := file.readinto(buffer[: end - position])):
                    digest.update(buffer[:count])
                    position += count
        return digest.hexdigest()

    def _flush(self) -> None:
        position = 0
        with self._path.open("rb", buffering=0) as file:
            while end := self._available(position, _FLUSHED):
                os.fdatasync(file.fileno())
                position = end

    def _available(self, position: int, least: int = 1) -> int:
        """Wait for `least` bytes beyond `position`.

        Gives their end; at the end of the file there may be fewer, and then none, 0.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._written >= position + least or self._complete)
            return self._written if self._written > position else 0
