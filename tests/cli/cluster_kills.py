"""Kills a worker and then the driver of a run on a cluster, and proves by their processes that they died."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.cli.helpers import fork

# Longest time in seconds for a start, for a process to vanish.
_START, _END = 120, 30
# Random moments: seconds from the workers' start to a worker's death, and from there to the driver's.
_WORKER, _DRIVER = 1.5, 4.0


@dataclass
class Deaths:
    """Processes that were seen alive at the run's work, were killed, and are dead."""

    workers: int = 0
    replaced: int = 0
    drivers: int = 0

    def suffice(self, pairs: int) -> bool:
        """Whether a worker and then its driver died so often, and lost workers were replaced meanwhile."""
        return self.workers >= pairs and self.drivers >= pairs and self.replaced >= 2


def kill_worker_then_driver(arguments: list[str], log: Path, chosen: random.Random, deaths: Deaths) -> int:
    """Start a driver, kill one of its workers, then the driver; both at random moments.

    Returns its exit code, which is 0 when it finished before. A driver counts only if its worker died before it.
    """
    driver = fork(*arguments, "-v", log=log)
    died = False
    try:
        if _has_workers(driver, log, 2):
            time.sleep(chosen.uniform(0, _WORKER))
            died = _kill_a_worker(driver, log, chosen)
            time.sleep(chosen.uniform(0, _DRIVER))
    finally:
        driver.kill()
        driver.join()
    deaths.workers += died
    deaths.replaced += died and "was lost, another takes over its work" in log.read_text()
    deaths.drivers += died and driver.exitcode == -signal.SIGKILL
    assert driver.exitcode is not None
    return driver.exitcode


def wait_for_end(logs: list[Path]) -> None:
    """Wait until no worker that the logs name is alive: workers end with their driver."""
    deadline = time.monotonic() + _END
    while alive := [number for log in logs for number in _workers(log) if _is_worker(number)]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their drivers"
        time.sleep(0.1)


def _has_workers(driver: BaseProcess, log: Path, count: int) -> bool:
    """Wait until so many workers are there; False when the run has ended before."""
    deadline = time.monotonic() + _START
    while len(_workers(log)) < count:
        if not driver.is_alive():
            return False
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return True


def _kill_a_worker(driver: BaseProcess, log: Path, chosen: random.Random) -> bool:
    """Kill a worker and wait until its process is gone; True when the driver has outlived it."""
    alive = [number for number in _workers(log) if _is_worker(number)]
    if not alive or not driver.is_alive():
        return False
    number = chosen.choice(alive)
    os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + _END
    while _is_worker(number):
        assert time.monotonic() < deadline, f"worker {number} outlives SIGKILL"
        time.sleep(0.01)
    return driver.is_alive()


def _workers(log: Path) -> list[int]:
    """Process ids of the workers that a driver has told of."""
    text = log.read_text() if log.exists() else ""
    return [int(number) for number in re.findall(r"^worker \d+ on .*, process (\d+)$", text, re.MULTILINE)]


def _is_worker(number: int) -> bool:
    """Whether a process is alive and Ray calls it a worker of quantize; a zombie has no command line."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().startswith(b"ray::Member")
    except (FileNotFoundError, ProcessLookupError):
        return False
