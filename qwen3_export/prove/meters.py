"""Meters beside a latency run: other work on the machine, memory bandwidth, energy.

other work    /proc/stat before and after, less the time of this process and its children
bandwidth     a large array, read by as many threads as the runtime has
energy        /sys/class/powercap/intel-rapl:N (a counter per socket; Intel and AMD)
              /sys/…/hwmonN of an INA3221 (the power rails of a Jetson: volts and amperes, sampled)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

_ARRAY_BYTES, _READS = 128 << 20, 4
_EVERY = 0.05
# Other processes that keep more processors busy than this lead to a warning.
NOTICEABLE = 0.1


@dataclass(frozen=True)
class _Moment:
    wall: float
    busy: float
    own: float


class MachineLoad:
    """Measures the processor time of other processes, from its creation on."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._begin = self._now()

    def _now(self) -> _Moment:
        try:
            first = self._stat.read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            first = []
        ticks = [int(value) for value in first]
        # Columns: user nice system idle iowait irq softirq steal. All but idle and iowait count as work, steal too.
        busy = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK") if len(ticks) > 4 else float("nan")
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return _Moment(time.monotonic(), busy, own)

    def others(self) -> float | None:
        """Mean number of processors busy with other work, None where unknown."""
        begin, end = self._begin, self._now()
        wall = max(end.wall - begin.wall, 1e-9)
        found = ((end.busy - begin.busy) - (end.own - begin.own)) / wall
        return None if np.isnan(found) else max(0.0, float(found))


def memory_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory: the best of several passes."""
    pieces = [np.ones(_ARRAY_BYTES // 8 // threads, np.int64) for _ in range(threads)]
    total, best = sum(piece.nbytes for piece in pieces), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS + 1):
            started = time.perf_counter()
            list(pool.map(lambda piece: int(piece.max()), pieces))
            best = max(best, total / (time.perf_counter() - started))
    return best


class EnergyMeter(Protocol):
    """Counts joules from `start` to `stop`."""

    source: str

    def start(self) -> None:
        """Start counting."""

    def stop(self) -> float:
        """Joules since `start`."""


def energy_meter(system: Path = Path("/sys")) -> EnergyMeter | None:
    """The platform's energy meter, None where none can be read."""
    sockets = [path for path in sorted(system.glob("class/powercap/intel-rapl:*")) if path.name.count(":") == 1]
    if sockets and all(_reads(path / "energy_uj") for path in sockets):
        return _Rapl(sockets)
    rails = _power_inputs(system)
    return _Rails(rails) if rails else None


def _reads(path: Path) -> bool:
    try:
        int(path.read_text())
    except (OSError, ValueError):
        return False
    return True


class _Rapl:
    source = "RAPL, whole sockets"

    def __init__(self, sockets: list[Path]) -> None:
        self._sockets = sockets

    def _counts(self) -> list[int]:
        return [int((socket / "energy_uj").read_text()) for socket in self._sockets]

    def start(self) -> None:
        self._begin = self._counts()

    def stop(self) -> float:
        total = 0
        for socket, begin, end in zip(self._sockets, self._begin, self._counts(), strict=True):
            # At the end of its range the counter wraps to zero.
            around = int((socket / "max_energy_range_uj").read_text()) if end < begin else 0
            total += end - begin + around
        return total * 1e-6


def _is_input(label: Path) -> bool:
    """Whether a rail supplies the whole board: its sum includes all other rails."""
    try:
        return label.read_text().strip().upper() in ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")
    except OSError:
        return False


def _power_inputs(system: Path) -> list[Callable[[], float]]:
    """One function per supply rail that reads its watts, millivolts times milliamperes."""
    found: list[Callable[[], float]] = []
    for label in sorted(system.glob("class/hwmon/hwmon*/in*_label")):
        if _is_input(label):
            number = label.name.removeprefix("in").removesuffix("_label")
            volts, amperes = label.parent / f"in{number}_input", label.parent / f"curr{number}_input"
            found.append(partial(_watts, volts, amperes))
    return found


def _watts(volts: Path, amperes: Path) -> float:
    return int(volts.read_text()) * int(amperes.read_text()) * 1e-6


class _Rails:
    source = "board supply rails, sampled"

    def __init__(self, rails: list[Callable[[], float]]) -> None:
        self._rails = rails

    def start(self) -> None:
        self._joules, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        last = time.perf_counter()
        while True:
            ended = self._done.wait(_EVERY)
            watts, now = sum(read() for read in self._rails), time.perf_counter()
            self._joules += watts * (now - last)
            last = now
            if ended:
                return

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return self._joules
