"""What the machine can do at best, and whether anything else is using it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_BYTES, _TURNS = 256 << 20, 5
# Above this share of all processors a measurement says little.
_QUIET = 0.1


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory together, the best of some turns."""
    pieces = [np.ones(_BYTES // threads // 8, np.float64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_TURNS):
            started = time.perf_counter()
            list(pool.map(np.max, pieces))
            best = max(best, sum(piece.nbytes for piece in pieces) / (time.perf_counter() - started))
    return best


def busy_share(seconds: float = 1.0) -> float:
    """Share of all processors that other processes use, while this one sleeps."""

    def ticks() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    before = ticks()
    time.sleep(seconds)
    total, idle = (after - first for after, first in zip(ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def warning() -> str | None:
    """A line about other work on this machine, or None when it is quiet."""
    share = busy_share()
    return f"other work uses {share:.0%} of this machine: the figures are too low" if share > _QUIET else None
