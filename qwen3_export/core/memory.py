"""Memory that this process can still take.

The machine's own counts, and the limits of its containers.

    /proc/meminfo                          MemAvailable: what the kernel can give without swapping
    /sys/fs/cgroup/GROUP/memory.max        the container's limit, "max" without one       memory.current: what it holds
    /sys/fs/cgroup/GROUP/memory.stat       inactive_file: of that, what is given back when it is needed
"""

from __future__ import annotations

from pathlib import Path

from qwen3_export.core.processors import group_folders

_MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """The smallest of all that is left, None where the machine does not say."""
    found = [room for folder in group_folders() if (room := _room_in(folder)) is not None]
    try:
        lines = meminfo.read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024)
    except (OSError, StopIteration, ValueError):
        pass
    return min(found, default=None)


def _room_in(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        held = int((folder / "memory.current").read_text())
        stated = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Pages of files, which the kernel gives up when memory is asked for.
        cached = sum(int(stated.get(f"{kind}_file", 0)) for kind in ("inactive", "active"))
        return max(0, int(limit) - held + cached)
    except (OSError, ValueError):
        return None
