"""Where an output may go.

It may not go over an input, inside one or around one, nor over what is not ours.

wanted      compared with                       through
OUTPUT      every input, as named and resolved   links, `..`, hard links, a hub cache's links to its blobs
OUTPUT      what is there already               `--force` replaces folders of ours, and regular files
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from qwen3_export.core.disk import FULL
from qwen3_export.core.manifest import MANIFEST
from qwen3_export.errors import InputError

_BESIDE = "choose a place beside it"
# Files of an input that are compared one by one; a checkpoint has far fewer.
_MOST_FILES = 10_000


Inputs = Iterable[str | Path | None]


def checked_place(output: Path, inputs: Inputs = (), force: bool = False, folder: bool = True) -> Path:
    """The absolute path of an output that may be written.

    InputError with the reason when it may not.

    `inputs` are what the command reads, as given: paths, or words such as a hub id, which are no path and are passed
    over. `folder` says whether a folder or one file is to be written. Nothing is touched.
    """
    place = absolute_place(output)
    refuse_existing(place, force, folder)
    for given in inputs:
        if given is not None:
            _refuse_overlap(output, place, Path(os.path.expanduser(given)))
    return place


def file_place(output: str) -> Path:
    """The path of an output that is one file.

    InputError for a name that ends in a slash, which a path does not keep.
    """
    name = output.rstrip("/")
    if name and name != output:
        raise InputError(f"{output} names a folder, a file was expected", f"{name}, or a file in it: {name}/NAME")
    return Path(output)


def absolute_place(output: Path) -> Path:
    """The path without `..`, its last name not followed where it is a link.

    InputError for the current folder or one around it.
    """
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{str(output)!a}: not valid UTF-8", "choose another name") from error
    if "\0" in str(output):
        raise InputError(f"{str(output)!a}: a name cannot hold a zero byte", "choose another name")
    if str(output) == "-":
        raise InputError("an output cannot go to stdout, which '-' stands for", "name a file or folder")
    place = output.absolute()
    if ".." in place.parts:
        place = _resolved(place) if place.name == ".." else _resolved(place.parent) / place.name
    here = Path.cwd()
    if not place.name or place == here or place in here.parents:
        raise InputError(f"{str(output)!r} is the current folder or around it", "name a new folder or file")
    return place


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be resolved ({error})", "choose another place") from error


def refuse_existing(place: Path, force: bool, folder: bool = True) -> None:
    """Raise InputError when `place` exists and may not be replaced.

    With `force`, what is ours or empty may.
    """
    try:
        mode = place.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    leads_to = _leads_to(place, mode)
    if stat.S_ISDIR(leads_to) and not folder:
        raise InputError(f"{place} is a folder, a file was expected", "choose another place")
    if folder and leads_to and not stat.S_ISDIR(leads_to):
        raise InputError(f"{place} is a file, a folder was expected", "choose another place")
    if not force:
        raise InputError(f"{place} exists already", "choose another place, or --force to replace it")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise InputError(f"{place} is neither a file nor a folder: it is not replaced", "choose another place")
    if stat.S_ISDIR(mode) and any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise InputError(
            f"{place} is a folder that qwen3-export did not write: it is not replaced", "remove it yourself"
        )


def no_place(wanted: Path, error: OSError) -> BaseException:
    """What to raise where a file or folder cannot be made.

    A full disk stays what it is; everywhere else another place helps.
    """
    if error.errno in FULL:
        return error
    place = wanted.with_name(wanted.name.removesuffix(".partial"))
    reason = f"{place.parent} takes no new files" if error.errno == errno.ENOENT else error.strerror
    return InputError(f"{place} cannot be written ({reason})", "choose another place")


def _leads_to(place: Path, mode: int) -> int:
    """The mode of what a link leads to, 0 when that is nothing.

    Else the mode itself.
    """
    if not stat.S_ISLNK(mode):
        return mode
    try:
        return place.stat().st_mode
    except OSError:
        return 0


def _refuse_overlap(output: Path, place: Path, given: Path) -> None:
    """Raise InputError where the output or its partial folder would touch an input."""
    if not os.path.lexists(given):
        return
    targets = {place, _resolved(place.parent) / place.name}
    sources = {given.absolute(), _resolved(given)}
    partials = {target.with_name(f"{target.name}.partial") for target in targets}
    for source in sources:
        for target in targets | partials:
            if target == source:
                what = "is" if target in targets else "is written in the place of"
                raise InputError(f"{output} {what} the input {given}", "choose another place: inputs are kept")
            if source in target.parents:
                raise InputError(f"{output} lies inside the input {given}", _BESIDE)
            if target in source.parents:
                raise InputError(f"{output} is around the input {given}", "choose another place: inputs are kept")
    _refuse_files(output, targets, given)


def _refuse_files(output: Path, targets: set[Path], given: Path) -> None:
    """Refuse the files of an input, by whatever name they have.

    Links may lead elsewhere, and one file may have two names.
    """
    own = _identity(next(iter(targets)))
    for file in _files(given):
        real = _resolved(file)
        if any(target == real or target in real.parents for target in targets):
            raise InputError(
                f"{output} holds {file.name} of the input {given}", "choose another place: inputs are kept"
            )
        if own is not None and own == _identity(real):
            raise InputError(f"{output} is {file.name} of the input {given} under another name", _BESIDE)


def _files(given: Path) -> Iterator[Path]:
    if given.is_file():
        yield given
        return
    if not given.is_dir():
        return
    count = 0
    for place, _, names in os.walk(given):
        for name in names:
            yield Path(place) / name
            count += 1
            if count == _MOST_FILES:
                return


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of a regular file.

    Two names of one file have the same.
    """
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
