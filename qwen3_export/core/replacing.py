"""How a complete folder takes its output's name: by one rename or two.

1   OUTPUT          is marked as ours, and becomes .OUTPUT.replaced, where one is there
2   OUTPUT.partial  becomes OUTPUT, and loses its mark
3   the old one     is removed

A kill between them leaves what `finish_replacing` mends.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qwen3_export.core.disk import flush
from qwen3_export.core.manifest import MARKER
from qwen3_export.errors import InputError


def _replaced(place: Path) -> Path:
    """Where an output that is being replaced lies between two renames."""
    return place.with_name(f".{place.name}.replaced")


def finish_replacing(place: Path) -> None:
    """Mend what a kill between the two renames left.

    The old output is put back, or removed beside a new one. Raises InputError for a file of somebody else's with the
    name that is needed.
    """
    old = _replaced(place)
    if old.is_symlink() or not (old / MARKER).is_file():
        if os.path.lexists(old) and place.is_dir():
            raise InputError(f"{old} was not left by qwen3-export", "move it away: its name is needed")
        return
    if os.path.lexists(place):
        _remove_marked(old)
    else:
        old.rename(place)
        (place / MARKER).unlink()


def move_into_place(partial: Path, place: Path) -> None:
    """Give a complete partial folder its output's name, flushed to the disk."""
    for path in partial.rglob("*"):
        if path.is_file() and path.name != MARKER:
            flush(path)
    flush(partial)
    if place.is_symlink():
        place.unlink()
    old = _replaced(place) if place.is_dir() else None
    try:
        if old is not None:
            (place / MARKER).touch()
            place.rename(old)
        partial.rename(place)
    except BaseException:
        if old is not None:
            finish_replacing(place)
            (place / MARKER).unlink(missing_ok=True)
        raise
    (place / MARKER).unlink()
    if old is not None:
        _remove_marked(old)
    flush(place.parent)


def _remove_marked(old: Path) -> None:
    # The marker goes last: what an interruption leaves is still known as ours.
    for path in old.iterdir():
        if path.name != MARKER:
            (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)
    shutil.rmtree(old)
