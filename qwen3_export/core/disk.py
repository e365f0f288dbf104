"""A path's disk, its free space, and errors that name it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3_export.core.units import binary_size
from qwen3_export.errors import ResourceError

# Errors of a full disk, of a used-up quota, and of a limit on the size of a file (`ulimit -f`, or the file system's).
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside the block name the file.

    Writing and flushing by descriptor raise errors without a name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def naming_full(path: Path) -> Iterator[None]:
    """Let an error of a full disk inside the block name the file.

    One that names a file already is left as it is. For blocks that also read: an error of reading is no error of this
    file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def disk_of(path: Path) -> Path:
    """The mount point of a path's file system; the path itself may be missing."""
    place = nearest(path).resolve()
    while not os.path.ismount(place):
        place = place.parent
    return place


def stored_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Room:
    """Bytes still to be written to one file system, and its free bytes.

    `folder` is the last of those that the bytes are for.
    """

    folder: Path
    needed: int
    free: int

    @property
    def suffices(self) -> bool:
        """Whether all of it fits."""
        return self.needed <= self.free


def room_of(needed: Mapping[Path, int]) -> list[Room]:
    """The room on each disk for the bytes that some folders still get.

    Folders on one file system share its space. They may be missing yet.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(os.stat(nearest(folder)).st_dev, []).append(folder)
    return [
        Room(folders[-1], sum(map(needed.__getitem__, folders)), shutil.disk_usage(nearest(folders[-1])).free)
        for folders in disks.values()
    ]


def check_room(needed: Mapping[Path, int], hints: Mapping[Path, str]) -> None:
    """Raise ResourceError when a disk has too little space for its folders.

    `needed` are the most bytes that each folder will hold, present files included. `hints` are the remedies by folder.
    """
    for room in room_of({folder: max(most - stored_bytes(folder), 0) for folder, most in needed.items()}):
        if not room.suffices:
            needs, free = binary_size(room.needed), binary_size(room.free, up=False)
            raise ResourceError(f"{room.folder.parent}: about {needs} are needed, {free} are free", hints[room.folder])
