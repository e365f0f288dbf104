"""A path's disk, its free space, and errors that name it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qwen3_export.core.units import binary_size
from qwen3_export.errors import ResourceError


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


def disk_of(path: Path) -> Path:
    """The mount point of a path's file system; the path itself may be missing."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    place = place.resolve()
    while not os.path.ismount(place):
        place = place.parent
    return place


def stored_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(needed: Mapping[Path, int], hints: Mapping[Path, str]) -> None:
    """Raise ResourceError when a disk has too little space for its folders.

    `needed` are the most bytes that each folder will hold, present files included. Folders on one file system share its
    space. `hints` are the remedies by folder.
    """
    for disk in {os.stat(folder).st_dev for folder in needed}:
        folders = [folder for folder in needed if os.stat(folder).st_dev == disk]
        wanted = sum(needed[folder] - stored_bytes(folder) for folder in folders)
        free, last = shutil.disk_usage(folders[-1]).free, folders[-1]
        if wanted > free:
            raise ResourceError(
                f"{last.parent}: about {binary_size(wanted)} are needed, {binary_size(free, up=False)} are free",
                hints[last],
            )
