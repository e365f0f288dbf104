"""The process: its heap, and imports of large native libraries.

What concerns the heap works where the C library is glibc.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt; 32 MiB is the most that it takes for the second.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
# Option of prctl, Linux's alone.
_PARENT_DEATH_SIGNAL = 1
_LARGEST_IN_HEAP, _KEPT = 32 << 20, 1 << 30
# How many kernels torch keeps, in all and in every thread; it reads these where it makes the first.
_KERNELS, _CACHES = 32, ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_freed_memory() -> None:
    """Let all threads allocate from one heap that keeps what is freed.

    This works where the C library is glibc.

    With a heap each, what one thread frees no other can use: a sparse block took 2.6 times the memory
    of what was alive in it. Pages that are given back and taken again cost more than the work on them:
    `trim_heap` gives them back where nothing is at hand that the next step could use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def end_with_parent() -> None:
    """Let this child process be killed when its parent is, on Linux.

    It would go on for minutes, and write into a folder that the next run has taken over.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def keep_few_kernels() -> None:
    """Let torch keep few of its kernels for products in 16 bits.

    An environment variable of torch's that is set already wins.

    Each is made for one shape, and a thousand are kept, in every thread again: with the numbers of tokens that
    experts happen to get, all are different, and a run took up to 100 MB more with every block.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(_KERNELS))


def trim_heap() -> None:
    """Give freed memory back to the system.

    Called between blocks, so that what is scattered over the heap does not add up; it works where the C library
    is glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# What stops a run as Ctrl-C does: a service manager, and a terminal that is closed.
STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold back the garbage collector during an import.

    An import makes many objects that stay, and searching them in vain takes a seventh of the time.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP until the block is done.

    KeyboardInterrupt is raised right after it.

    A native module whose initialisation meets a KeyboardInterrupt aborts the whole process. A signal
    mask would not do: another thread may take the signal, and the exception is raised here all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    # None: a program that holds this interpreter has a handler of its own, which could not be put back.
    skipped = (None, signal.SIG_IGN)
    numbers = [number for number in (signal.SIGINT, *STOPPING) if signal.getsignal(number) not in skipped]
    before = [(number, signal.signal(number, lambda found, _frame: caught.append(found))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
