"""Runs a command in its own process; measures time, memory and scratch space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.process import environment, high_water

_CODE = "from qwen3_export.cli import main; main()"


@dataclass(frozen=True)
class Run:
    """A command's cost, and the result that it printed with `--json`."""

    wall_s: float
    cpu_s: float
    peak_rss: int
    scratch_bytes: int
    result: dict[str, Any]


def measure(arguments: Sequence[str | Path], threads: int, scratch: Path | None = None) -> Run:
    """Run `qwen3-export ARGUMENTS --json`; RuntimeError with its last lines where it fails."""
    command = [sys.executable, "-c", _CODE, *map(str, arguments), "--json", "--quiet"]
    started, peak, spilled = time.monotonic(), 0, 0
    with subprocess.Popen(
        command, env=environment(threads, {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            peak = max(peak, high_water(process.pid))
            spilled = max(spilled, used(scratch)) if scratch is not None else 0
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        out, said = process.communicate()
    if process.returncode:
        raise RuntimeError(" / ".join(said.strip().splitlines()[-2:]) or f"status {process.returncode}")
    cost = usage.ru_utime + usage.ru_stime
    return Run(time.monotonic() - started, cost, peak, spilled, json.loads(out))


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
