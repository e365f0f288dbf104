"""Folders for intermediate files: reserved like outputs, removed at the end.

OUTPUT.quantized.partial/                  the quantized copy that an export with a recipe is made from
SCRATCH/OUTPUT-1a2b3c4d.activations.partial/   activations on a disk of their own; the digits tell outputs apart
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3_export.core.manifest import MANIFEST, MARKER
from qwen3_export.core.outputs import partial_path, reserved
from qwen3_export.core.places import Inputs, checked_place
from qwen3_export.errors import InputError


@contextmanager
def working_folder(
    output: Path, name: str, inputs: Inputs = (), kept: Callable[[BaseException], bool] | None = None
) -> Iterator[Path]:
    """Yield `OUTPUT.NAME.partial/`, locked, for intermediate files; removed at the end.

    The next run finds in it what a killed run has left. `kept` decides after an error whether the folder stays; by
    default it stays when an unfinished run in it can be resumed, or when a run in it is finished and the input was not
    refused.
    """
    place = checked_place(output, inputs, force=True, folder=not output.is_file())
    with reserved(place.with_name(f"{place.name}.{name}")) as reservation:
        try:
            yield reservation.partial
        except BaseException as error:
            unfinished = any(reservation.partial.glob("*.partial/state/progress.json"))
            finished = any(reservation.partial.glob(f"*/{MANIFEST}")) and not isinstance(error, InputError)
            reservation.undo(everything=not (unfinished or finished if kept is None else kept(error)))
            raise
        reservation.undo(everything=True)


@contextmanager
def scratch_folder(
    scratch: Path | None, output: Path, inputs: Inputs = (), kept: Callable[[BaseException], bool] = lambda _: False
) -> Iterator[Path | None]:
    """Yield an output's folder in `scratch`, as `working_folder` does; None without one.

    Raises InputError where it would lie in the output, or touch one of `inputs`.
    """
    if scratch is None:
        yield None
        return
    place, written = _place(scratch, output), output.absolute()
    if {written, partial_path(written)} & {place, *place.parents}:
        raise InputError(f"--scratch {scratch} lies inside the output {output}", "choose a folder beside it")
    with working_folder(place, "activations", inputs, kept) as folder:
        yield folder


def quantized_path(output: Path) -> Path:
    """The folder that an export with a recipe quantizes in."""
    return partial_path(output.with_name(f"{output.name}.quantized"))


def activations_path(scratch: Path, output: Path) -> Path:
    """The folder that `scratch_folder` yields for an output."""
    place = _place(scratch, output)
    return partial_path(place.with_name(f"{place.name}.activations"))


def _place(scratch: Path, output: Path) -> Path:
    digits = hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:8]
    return scratch.absolute() / f"{output.name}-{digits}"


@contextmanager
def left_behind(folder: Path) -> Iterator[Path | None]:
    """Yield a working folder of an earlier run, locked; None when there is none.

    It is removed when the block ends without an error.
    """
    if folder.is_symlink() or not (folder / MARKER).is_file() or folder.suffix != ".partial":
        yield None
        return
    with reserved(folder.with_suffix("")) as reservation:
        yield reservation.partial
        reservation.remove()
