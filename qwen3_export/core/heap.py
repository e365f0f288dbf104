"""The C library's heap, where it is glibc: one for all threads, given back at times that are known."""

from __future__ import annotations

import ctypes

# Parameters of mallopt; 32 MiB is the most that it takes for the second.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
_LARGEST_IN_HEAP, _KEPT = 32 << 20, 1 << 30


def keep_memory() -> None:
    """Let all threads allocate from one heap that keeps what is freed, where the C library is glibc.

    With a heap each, what one thread frees no other can use: a sparse block took 2.6 times the memory
    of what was alive in it. Pages that are given back and taken again cost more than the work on them:
    `give_back` gives them back where nothing is at hand that the next step could use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Give freed memory back to the system, where the C library is glibc: between blocks, so that what is
    scattered over the heap does not add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
