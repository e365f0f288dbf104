"""The machine: its processor, its memory bandwidth, and other work on it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

_BYTES, _TURNS = 256 << 20, 5
# Other work on more than this share of the processors makes a measurement doubtful.
QUIET = 0.1


def describe(packages: tuple[str, ...] = ("onnxruntime", "onnxruntime-genai", "xllamacpp")) -> str:
    """One line: date, processor, and the versions of what was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    instructions = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [name for name in ("avx2", "avx512_vnni", "amx_int8") if name in instructions]
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    processor = f"{model} ({', '.join(known)}), {len(os.sched_getaffinity(0))} processors"
    return f"{time.strftime('%Y-%m-%d')}; {processor}; {', '.join(versions)}."


def read_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read from memory: the best pass."""
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
    """A warning about other work on this machine, None when it is idle."""
    share = busy_share()
    return f"other work uses {share:.0%} of this machine: the figures are too low" if share > QUIET else None
