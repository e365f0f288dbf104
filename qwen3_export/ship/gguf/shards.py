"""The shards of a GGUF file: their names, and how they appear together.

    OUTPUT.partial/                      all shards of one export, whatever their number and size
        moving.json                      written when all are complete: which files they are
    NAME-00001-of-0000N.gguf …           moved there one by one, the first one last

llama.cpp opens the others through the first one. Where a run is killed between two moves, the list says which files
are its own: the next run on the same output takes them away and starts over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwen3_export.core.disk import flush
from qwen3_export.core.gguf_header import part_name
from qwen3_export.core.manifest import MARKER
from qwen3_export.core.outputs import clear_partial, partial_path, remove_leftover, reserved, write_atomic
from qwen3_export.core.places import Inputs, checked_place
from qwen3_export.errors import InputError

_MOVING = "moving.json"


def shard_paths(output: Path, count: int) -> list[Path]:
    """Paths of an output's shards; the output itself if there is only one."""
    if count == 1:
        return [output]
    stem = output.name.removesuffix(".gguf")
    return [output.with_name(part_name(stem, number, count)) for number in range(1, count + 1)]


def earlier_files(output: Path, paths: Sequence[Path]) -> list[Path]:
    """Files of an output that is there in another number of shards.

    These are the output's own name, and names that `shard_paths` could have given. llama.cpp's tools take all shards of
    a name for one model.
    """
    stem = re.escape(output.name.removesuffix(".gguf"))
    shard = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.gguf")
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    shards = [
        path for path in sorted(beside) if (names := shard.fullmatch(path.name)) and "00001" <= names[1] <= names[2]
    ]
    return [path for path in ([output] if os.path.lexists(output) else []) + shards if path not in paths]


def check_places(output: Path, count: int, force: bool, inputs: Inputs) -> None:
    """Raise InputError when a file of an output may not be replaced.

    That is one of its shards, or a file of an earlier output of its name. What a killed run has left may.
    """
    paths, inputs, left = shard_paths(output, count), list(inputs), left_by_a_kill(output)
    try:
        for path in (*paths, *earlier_files(output, paths)):
            checked_place(path, inputs, force or path in left, folder=False)
    except InputError:
        remove_leftover(output, _MOVING)
        raise


@contextmanager
def staged_files(output: Path, count: int, force: bool, inputs: Inputs) -> Iterator[list[Path]]:
    """Partial files for an output's shards, renamed when all are done.

    Then the files of an earlier output in another number of shards are removed.
    """
    check_places(output, count, force, inputs := list(inputs))
    place, paths = checked_place(output, inputs, force, folder=False), shard_paths(output, count)
    with reserved(place) as reservation:
        check_places(output, count, force, inputs)
        _take_back(output)
        clear_partial(reservation.partial)
        earlier = earlier_files(output, paths)
        try:
            yield [reservation.partial / path.name for path in paths]
            _move(reservation.partial, paths)
            for path in earlier:
                path.unlink(missing_ok=True)
        except BaseException:
            _take_back(output)
            reservation.undo(everything=True)
            raise
        reservation.remove()
    flush(place.parent)


def _move(partial: Path, paths: Sequence[Path]) -> None:
    """Move complete shards to their places, the first one last.

    An earlier first shard goes before any other is replaced, so that it never leads to others' data.
    """
    for path in paths:
        flush(partial / path.name)
    if len(paths) > 1:
        write_atomic(partial / _MOVING, json.dumps({path.name: _identity(partial / path.name) for path in paths}))
        flush(partial)
        paths[0].unlink(missing_ok=True)
    for path in reversed(paths):
        (partial / path.name).replace(path)


def _identity(file: Path) -> list[int]:
    """What a file keeps when it is renamed, and no other file has."""
    status = file.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def left_by_a_kill(output: Path) -> list[Path]:
    """Shards that a killed run has moved to their places already.

    There are none where the first one, the last to be moved, is no longer in the partial folder: then the output is
    whole. What somebody else has put in such a place since is not among them.
    """
    partial = partial_path(output)
    if partial.is_symlink() or not (partial / MARKER).is_file():
        return []
    try:
        moving = json.loads((partial / _MOVING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(moving, dict) or not moving or not (partial / min(moving)).exists():
        return []
    places = [path for path in shard_paths(output, len(moving)) if os.path.lexists(path)]
    return [path for path in places if moving.get(path.name) == _identity(path)]


def _take_back(output: Path) -> None:
    for path in left_by_a_kill(output):
        path.unlink()
