"""Runs a job in a process of its own and measures its cost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Cost of a process from start to end, imports included."""

    wall_s: float
    cpu_s: float
    peak_rss: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def run(command: Sequence[str | Path], folder: Path, threads: int, timeout: float, **extra: str) -> Cost:
    """Run a command in `folder` and measure it; its output goes to `log.txt`.

    CPU time is the kernel's, of the child and its own children. Raises RuntimeError with the end of the log when the
    command fails.
    """
    started = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=environment(threads, extra),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status, usage, peak = wait(process.pid, started + timeout)
    if status != 0:
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(" / ".join(line.strip() for line in tail) or f"status {status}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, peak)


def wait(pid: int, deadline: float) -> tuple[int, resource.struct_rusage, int]:
    """Wait for a child and watch its peak memory.

    At the deadline, or when this process is stopped, the child's process group is killed.
    """
    peak = 0
    try:
        while time.monotonic() < deadline:
            peak = max(peak, high_water(pid))
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                return status, usage, peak
            time.sleep(0.05)
    except BaseException:
        end(pid)
        raise
    end(pid)
    raise RuntimeError("took longer than the time limit (--timeout)")


def high_water(pid: int) -> int:
    """Peak resident memory of a process; rusage would include this process's at the fork."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def end(pid: int) -> None:
    """Kill a child that leads a process group of its own."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """No GPU, no hub, a fixed number of threads: the same for every tool."""
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that wait by spinning would count as CPU time and slow others down.
        "OMP_WAIT_POLICY": "passive",
    }
    return {**os.environ, **fixed, **extra}
