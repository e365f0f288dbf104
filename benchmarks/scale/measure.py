"""Runs a command in its own process; measures time, memory and scratch space.

Its output goes to files, since a pipe holds 64 KB and the result names every expert.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.process import environment, high_water


@dataclass(frozen=True)
class Run:
    """A command's cost, and the result that it printed with `--json`."""

    wall_s: float
    cpu_s: float
    peak_rss: int
    scratch_bytes: int
    result: dict[str, Any]
    spent: dict[str, float]


def measure(arguments: Sequence[str | Path], threads: int, scratch: Path | None = None) -> Run:
    """Run `qwen3-export ARGUMENTS --json`; RuntimeError with its last lines where it fails."""
    with tempfile.TemporaryDirectory() as name:
        out, said, times = (Path(name) / file for file in ("out", "said", "times"))
        timed = [sys.executable, "-m", "benchmarks.scale.timed", str(times)]
        started, peak, spilled = time.monotonic(), 0, 0
        with out.open("wb") as stdout, said.open("wb") as stderr:
            process = subprocess.Popen(
                [*timed, *map(str, arguments), "--json", "--quiet"],
                env=environment(threads, {}), stdout=stdout, stderr=stderr,
            )  # fmt: skip
        with process:
            while True:
                peak = max(peak, high_water(process.pid))
                spilled = max(spilled, used(scratch)) if scratch is not None else 0
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if done:
                    break
                time.sleep(0.2)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall, cost = time.monotonic() - started, usage.ru_utime + usage.ru_stime
        if process.returncode:
            last = said.read_text(errors="replace").strip().splitlines()[-2:]
            raise RuntimeError(" / ".join(last) or f"status {process.returncode}")
        return Run(wall, cost, peak, spilled, json.loads(out.read_text()), json.loads(times.read_text()))


def used(folder: Path) -> int:
    """Disk space of a folder, some of whose files may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += 512 * os.stat(os.path.join(place, name)).st_blocks
            except FileNotFoundError:
                continue
    return total
