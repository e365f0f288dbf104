"""Memory that this process can still take.

The machine's own counts, and the limits of its containers.

    /proc/meminfo                          MemAvailable: what the kernel can give without swapping
    /sys/fs/cgroup/GROUP/memory.max        the container's limit, "max" without one       memory.current: what it holds
    /sys/fs/cgroup/GROUP/memory.stat       inactive_file: of that, what is given back when it is needed
"""

from __future__ import annotations

import errno
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3_export.core.processors import group_folders
from qwen3_export.errors import ExportError, ResourceError

_MEMINFO = Path("/proc/meminfo")
HINT = "close other programs, or use a machine with more memory"
GPU_HINT = "close what else uses the GPU, or give a smaller context"
# Whoever computes says in its own words that an allocation failed:
#   Python, numpy    MemoryError: Unable to allocate 8.00 GiB for an array
#   C++              std::bad_alloc
#   ONNX Runtime     Failed to allocate memory for requested buffer of size 8589934592
#                    Available memory of 100 is smaller than requested bytes of 200
#   torch            DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes
#   llama.cpp        unable to allocate CPU buffer; failed to allocate buffer for kv cache; insufficient memory
#   the loader       libtorch.so: failed to map segment from shared object
#   TensorRT, CUDA   OutOfMemory (Requested size was 8589934592 bytes.); out of memory
_LACKS = re.compile(
    r"\bMemoryError\b|bad.?alloc|out.?of.?memory|(not enough|insufficient) memory|memory allocation failed"
    r"|((failed|unable) to|can.?t|cannot|could not) allocate|available memory of \d+ is smaller than"
    r"|failed to map segment(?!.*not permitted)",
    re.IGNORECASE,
)


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


def lacks_memory(error: BaseException | str) -> bool:
    """Whether an error, or a runtime's words, say that an allocation failed."""
    if isinstance(error, OSError) and error.errno is not None:
        # Its words name a file, which may have any name.
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _LACKS.search(str(error)) is not None


def out_of_memory(where: object, error: BaseException | str) -> ResourceError:
    """The error for a failed allocation, which names the work and the reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ResourceError(f"{where}: out of memory ({reason})", HINT)


@contextmanager
def memory_named(where: object) -> Iterator[None]:
    """Raise ResourceError for an allocation that fails inside, in whose words ever."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise out_of_memory(where, error) from error


def check_child(where: object, child: subprocess.CompletedProcess[str]) -> None:
    """Raise ResourceError for a child process that memory ended.

    The system killed it, or its last words say so.
    """
    last = (child.stderr.strip().splitlines() or [""])[-1]
    if child.returncode == -signal.SIGKILL:
        raise out_of_memory(where, "the system killed its process")
    if child.returncode and lacks_memory(last):
        raise out_of_memory(where, last)
