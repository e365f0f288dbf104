"""The interface through which long work reports its progress.

The class here is silent; the command line's own class draws bars.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Progress:
    """A silent progress display."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; call what is yielded once per step."""
        yield lambda: None

    def note(self, text: str) -> None:
        """Show one line about the state of the work."""

    def log(self, text: str) -> None:
        """Show one line to those who asked for details."""

    def warn(self, text: str) -> None:
        """Show one line that everyone should see."""


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes.

    Read from `/proc`, because `getrusage` of a child also counts what its parent held before `exec`.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
