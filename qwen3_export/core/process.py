"""The process: its heap, its signals, and imports of large native libraries.

Functions that concern the heap do nothing where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3_export.core.processors import others_wait

# Parameters of mallopt; 32 MiB is the most that it takes for the second.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
# Option of prctl, Linux's alone.
_PARENT_DEATH_SIGNAL = 1
_LARGEST_IN_HEAP, _KEPT = 32 << 20, 1 << 30
# How many kernels torch keeps, in all and in every thread. It reads these variables when it makes the first kernel.
_KERNELS, _CACHES = 32, ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# How long a waiting thread of GNU's OpenMP spins. The library reads it once, when it is loaded.
SPINS = "GOMP_SPINCOUNT"


# For a process whose threads, made by others, would have heaps before `keep_freed_memory` is called.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}


def keep_freed_memory() -> None:
    """Let all threads allocate from one heap that keeps freed memory.

    By default every thread has a heap of its own, and no other thread can use what it frees: a sparse block then took
    2.6 times the memory of its live data. Returning pages to the system and taking them again costs more than the work
    on them, so the heap keeps them until `trim_heap` returns them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def end_with_parent() -> None:
    """Let Linux kill this child process when its parent dies.

    Otherwise it could go on for minutes, and write into a folder that the next run has taken over.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def keep_few_kernels() -> None:
    """Let torch keep few of its kernels for products in 16 bits.

    torch makes a kernel for every shape and keeps a thousand in each thread. Experts get ever different numbers of
    tokens, so that without this limit a run took up to 100 MB more with every block. A value that the user has set in
    torch's environment variables is respected.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(_KERNELS))


def trim_heap() -> None:
    """Return freed memory to the system.

    It is called between blocks, because freed pieces scattered over the heap would add up from block to block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# Signals that stop a run as Ctrl-C does: from a service manager, and from a terminal that is closed.
STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold back the garbage collector during an import.

    An import makes many objects that stay alive; searching them for garbage takes a seventh of its time.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """Have torch, imported inside, let waiting threads sleep on a busy machine.

    A thread that spins takes the processor from what it waits for: prompts and decoding then took three to four times
    as long. What the user has set is respected.
    """
    if SPINS in os.environ or not others_wait():
        yield
        return
    os.environ[SPINS] = "0"
    try:
        yield
    finally:
        # Not for child processes: they look for themselves.
        os.environ.pop(SPINS, None)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP until the block is done, then raise KeyboardInterrupt.

    A KeyboardInterrupt during the initialisation of a native module aborts the whole process. Masking the signals would
    not help: another thread could receive them, and the exception would still be raised here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    # None: the program that embeds this interpreter has a handler of its own, which we could not restore.
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
