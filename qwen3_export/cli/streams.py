"""Standard streams that never turn a finished result into an error.

A reader may have gone (`… | head -1`), a disk be full, a stream be closed, an encoding lack a letter: what
cannot be shown is dropped or spelled out, and the exit code stays that of the work.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Steady(io.RawIOBase):
    """A descriptor to which writing never fails; `lost` is the error that ended it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write what can be written; everything counts as written once writing has failed."""
        while self.lost is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.lost = error
        return len(data)


def steady_streams() -> None:
    """Replace stdout and stderr by streams that cannot fail.

    Open closed descriptors, or the next file gets theirs.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _steady(sys.stdout, 1), _steady(sys.stderr, 2)


def _steady(old: TextIO | None, number: int) -> TextIO:
    if old is not None:
        with contextlib.suppress(OSError, ValueError):
            old.flush()
    encoding = getattr(old, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(_Steady(number))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", write_through=number == 2, line_buffering=True)


def finish_streams() -> None:
    """Flush.

    Say on stderr when the result could not be written, unless nobody was listening any more.
    """
    sys.stdout.flush()
    lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    if lost is not None and lost.errno != errno.EPIPE:
        print(f"warning: the result could not be shown: {lost.strerror}", file=sys.stderr)
    sys.stderr.flush()
