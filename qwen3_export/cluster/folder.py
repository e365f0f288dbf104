"""The folder of a cluster that is started here, with Ray's sockets and logs.

It is removed at the end. What a killed command has left is removed by the next one: its lock is gone with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "q3e-"
# Written once the folder is locked, so that a folder with it and without a lock has lost its process.
_MARKER = ".qwen3-export-cluster"
# Longest path to it: a socket's path may have 107 characters, and Ray's own names take 80.
_LONGEST_PLACE = 24


@contextmanager
def ray_folder() -> Iterator[str]:
    """Yield a new, locked folder in the folder for temporary files; removed afterwards."""
    usual = tempfile.gettempdir()
    place = usual if len(usual) <= _LONGEST_PLACE else "/tmp"
    _remove_left(place)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            Path(folder, _MARKER).touch()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(place: str) -> None:
    """Remove the folders of this user's commands that were killed."""
    for folder in Path(place).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.getuid() and (folder / _MARKER).is_file():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
