"""Standard streams whose failures do not end a command.

When the reader is gone (`… | head -1`), the disk is full, or the stream is closed, output is dropped; a character that
the encoding lacks is escaped. A result that is lost, unless its reader left, makes the exit code 4 at the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from qwen3_export.errors import ResourceError

_LOST = "free some room, or send stdout elsewhere; other files of the command are whole"


class _Steady(io.RawIOBase):
    """A raw stream whose writes never fail; `lost` is the first error."""

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
        """Write; after a failure, drop the data and report it as written."""
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

    Closed standard descriptors are opened first, since the next opened file would get their numbers.
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


def finish_streams(code: int) -> int:
    """Flush stdout and stderr; returns the exit code, 4 for a lost result.

    A result that could not be written is told on stderr, unless its reader had closed the pipe. A code other than 0
    stays.
    """
    sys.stdout.flush()
    lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    if lost is not None and lost.errno != errno.EPIPE:
        kind = "warning" if code else "error"
        print(f"{kind}: the result could not be written to stdout: {lost.strerror}", file=sys.stderr)
        if not code:
            print(f"hint: {_LOST}", file=sys.stderr)
            code = ResourceError.exit_code
    sys.stderr.flush()
    return code
