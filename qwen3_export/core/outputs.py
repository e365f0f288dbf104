"""Outputs that exist whole or not at all.

One place owns how they are reserved, finished and cleaned up.

    OUTPUT.partial/                 made exclusively, or taken over from a run of ours that died; locked
        .qwen3-export-partial       the mark that it is ours: without it nothing in there is touched
        …                           what becomes OUTPUT: the folder's files, or the one file
    OUTPUT                          appears by one rename, complete and flushed to the disk

No link is followed on the way. Parents that do not exist are made, and removed again when the run fails. The empty
partial folder of a run that was killed beside its finished OUTPUT goes with the next command that would write OUTPUT.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3_export.core.disk import flush, naming, naming_full
from qwen3_export.core.manifest import MARKER
from qwen3_export.core.places import Inputs, absolute_place, checked_place, no_place, refuse_existing
from qwen3_export.core.replacing import finish_replacing, move_into_place
from qwen3_export.errors import InputError


def partial_path(output: Path) -> Path:
    """Where an output is written until it is done."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, inputs: Inputs = (), force: bool = False, folder: bool = True) -> None:
    """Raise InputError when an output cannot be written or touches an input.

    `inputs` are all files and folders that the command reads. The place is tried out: it is reserved and given back.
    """
    place = _checked(output, inputs, force, folder)
    with reserved(place) as reservation:
        reservation.undo()


def remove_leftover(output: Path, *lists: str) -> None:
    """Remove the partial folder of a run that was killed after its end.

    Its output is whole: only the mark is in it, and perhaps `lists` of what was moved. Any other is left, and one that
    a run holds.
    """
    with suppress(InputError, OSError):
        place = absolute_place(output)
        partial, known = partial_path(place), (*lists, MARKER)
        if partial.is_symlink() or not (partial / MARKER).is_file() or _has_content(partial, known):
            return
        with reserved(place):
            if not _has_content(partial, known):
                for name in known:
                    (partial / name).unlink(missing_ok=True)
                partial.rmdir()


def _checked(output: Path, inputs: Inputs, force: bool, folder: bool = True) -> Path:
    """As `checked_place`; beside an output that is refused a leftover is removed."""
    try:
        return checked_place(output, inputs, force, folder)
    except InputError:
        remove_leftover(output)
        raise


@contextmanager
def staged_folder(
    output: Path, force: bool = False, inputs: Inputs = (), resumable: Callable[[BaseException], bool] | None = None
) -> Iterator[Path]:
    """Yield the locked `OUTPUT.partial/`; rename it to `OUTPUT` when the block ends well.

    On an error the partial folder is removed; where a run can go on, `resumable` says of an error whether it is kept
    as it stands. Raises InputError when the output exists, touches one of `inputs`, or is written by another run.
    """
    place = _checked(output, inputs, force)
    with reserved(place) as reservation:
        refuse_existing(place, force)
        if resumable is None:
            clear_partial(reservation.partial)
        try:
            with naming_full(reservation.partial):
                yield reservation.partial
            if not (reservation.partial / MARKER).exists():
                raise InputError(f"{reservation.partial} was removed while it was written")
            move_into_place(reservation.partial, place)
        except BaseException as error:
            if resumable is None or not resumable(error):
                reservation.undo(everything=True)
            raise


@contextmanager
def staged_file(output: Path, force: bool = False, inputs: Inputs = ()) -> Iterator[Path]:
    """As `staged_folder`, for a single file: yields `OUTPUT.partial/NAME`."""
    place = _checked(output, inputs, force, folder=False)
    with reserved(place) as reservation:
        refuse_existing(place, force, folder=False)
        clear_partial(reservation.partial)
        file = reservation.partial / place.name
        try:
            with naming_full(file):
                yield file
            flush(file)
            file.replace(place)
        except BaseException:
            reservation.undo(everything=True)
            raise
        reservation.remove()
    flush(place.parent)


def clear_partial(partial: Path) -> None:
    """Empty a reserved partial folder."""
    for path in partial.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    beside = path.with_name(path.name + ".new")
    with naming(beside):
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(path)


class Reservation:
    """A locked partial folder, and the parents that were made for it."""

    def __init__(self, partial: Path, parents: list[Path]) -> None:
        self.partial, self._parents = partial, parents

    def undo(self, everything: bool = False) -> None:
        """Give the place back as it was.

        An earlier run's files are kept unless `everything` goes.
        """
        if everything or not _has_content(self.partial):
            self.remove()
        if not self.partial.exists():
            _remove_folders(self._parents)

    def remove(self) -> None:
        """Remove the partial folder; what cannot be removed is left for the next run."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _has_content(partial: Path, known: Collection[str] = (MARKER,)) -> bool:
    try:
        return any(path.name not in known for path in partial.iterdir())
    except OSError:
        return False


@contextmanager
def reserved(place: Path) -> Iterator[Reservation]:
    """Make or take over `PLACE.partial/`, and hold its lock.

    The lock dies with the process, however that ends.
    """
    partial, parents = partial_path(place), _make_parents(place.parent)
    try:
        made = _make_folder(partial)
        descriptor = _open_folder(partial)
        try:
            _lock(descriptor, partial, place)
            _claim(descriptor, partial)
            finish_replacing(place)
            yield Reservation(partial, parents)
        except BaseException:
            if made and not _has_content(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
    except BaseException:
        _remove_folders(parents)
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Make a folder and those around it.

    Gives those that were made, the innermost first.
    """
    missing = []
    while not os.path.lexists(parent) and parent != parent.parent:
        missing.append(parent)
        parent = parent.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.insert(0, folder)
    except OSError as error:
        _remove_folders(made)
        raise no_place(folder, error) from error
    except BaseException:
        _remove_folders(made)
        raise
    return made


def _remove_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _make_folder(partial: Path) -> bool:
    try:
        partial.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise no_place(partial, error) from error
    return True


def _foreign(partial: Path) -> InputError:
    return InputError(f"{partial} is no unfinished output of qwen3-export", "move it away: its name is needed")


def _open_folder(partial: Path) -> int:
    try:
        return os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _foreign(partial) from error
        raise


def _lock(descriptor: int, partial: Path, place: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run is writing {place}", "wait for it, or choose another --output") from error
    try:
        same = os.stat(partial, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        same = False
    if not same:
        raise InputError(f"another run has just finished with {place}", "look at its output, then try again")


def _claim(descriptor: int, partial: Path) -> None:
    """Mark a partial folder as ours.

    Raises InputError when it holds what somebody else put there.
    """
    try:
        marked = stat.S_ISREG(os.stat(MARKER, dir_fd=descriptor, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        marked = False
    if not marked:
        if os.listdir(descriptor):
            raise _foreign(partial)
        os.close(os.open(MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=descriptor))
