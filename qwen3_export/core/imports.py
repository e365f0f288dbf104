"""Importing large native libraries: quickly, and so that Ctrl-C stays a clean exit."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold back the garbage collector: an import makes many objects that stay, and searching them in vain
    takes a seventh of the time."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the block is done; KeyboardInterrupt is raised right after it.

    A native module whose initialisation meets a KeyboardInterrupt aborts the whole process. A signal
    mask would not do: another thread may take the signal, and the exception is raised here all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, lambda found, _frame: caught.append(found))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
