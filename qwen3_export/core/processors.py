"""How many processors this process may keep busy.

The process's affinity and the quota of its container decide.

    cgroup v2   /sys/fs/cgroup/GROUP/cpu.max                    "150000 100000", or "max 100000"
    cgroup v1   /sys/fs/cgroup/cpu/GROUP/cpu.cfs_quota_us       150000, -1 for none      cpu.cfs_period_us  100000

Every group from the process's own up to the root may have a quota; the smallest counts. If there are more threads than
the quota allows, the kernel stops some for the rest of each period, and the others wait for them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from qwen3_export.errors import InputError

DEVICES = ("cpu", "cuda")
# llama.cpp aborts above it (GGML_MAX_N_THREADS).
MOST_THREADS = 512
_ROOT, _GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def thread_count(asked: int | None = None) -> int:
    """`asked`, by default the number of usable processors; InputError when out of range."""
    if asked is None:
        return min(processors(), MOST_THREADS)
    if not 1 <= asked <= MOST_THREADS:
        raise InputError(f"--threads {asked}: between 1 and {MOST_THREADS} were expected")
    return asked


def processors() -> int:
    """The default number of threads of a runtime, at least one."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def others_wait(loadavg: Path = Path("/proc/loadavg"), looks: int = 5, pause: float = 0.002) -> bool:
    """Whether other work leaves a runtime noticeably fewer processors than it has threads for.

    So it is where at every one of some looks, a moment apart, other tasks want to run, too many for the processors that
    are left and for an eighth of all. False where that cannot be read.
    """
    machine = os.cpu_count() or 1
    for look in range(looks):
        if look:
            time.sleep(pause)
        try:
            running = int(loadavg.read_text().split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        # One of them is this process, which reads.
        others = running - 1
        if others + processors() <= machine or others * 8 < machine:
            return False
    return True


def sums_int8_exactly(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Whether the processor sums products of uint8 and int8 without saturation.

    x86 does so with VNNI alone; where its features cannot be read, the answer is no.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64"):
        return True
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return bool(flags & {"avx512_vnni", "avx_vnni"})


def cpu_quota(root: Path = _ROOT, groups: Path = _GROUPS) -> float | None:
    """The smallest quota of all groups, in processors; None when there is no quota."""
    found = [quota for folder in group_folders(root, groups) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def group_folders(root: Path = _ROOT, groups: Path = _GROUPS) -> Iterator[Path]:
    """The process's groups of both versions, each with its parents up to the root."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = []
    places = [(root, "/")]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            places.append((root, path))
        elif "cpu" in controllers.split(","):
            places += [(root / name, path) for name in ("cpu", controllers)]
    for base, path in places:
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts) + 1):
            yield base.joinpath(*parts[:count])


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def check_device_name(device: str) -> None:
    """Raise InputError for a device that there is none of, without asking torch."""
    if device not in DEVICES:
        raise InputError(
            f"--device {device}: {' or '.join(DEVICES)} was expected",
            f"use {DEVICES[0]}, or {DEVICES[1]} for an NVIDIA GPU",
        )
