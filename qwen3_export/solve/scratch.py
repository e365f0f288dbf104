"""Activations on a disk of their own (`--scratch`).

    SCRATCH/OUTPUT-1a2b3c4d.activations.partial/   hidden states between blocks, states inside one, measured outputs

The progress of an unfinished run names this folder. If the run goes on with another scratch folder, or with none, the
files that outlast a block are moved and the rest is removed. Missing files are an error; they are not computed again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_export.core.disk import naming
from qwen3_export.core.working_folders import left_behind
from qwen3_export.errors import ExportError, StateError

if TYPE_CHECKING:
    from qwen3_export.solve.job import Job

_ENDING = ".activations.partial"


def bring_activations(before: Path, now: Path, state: Path) -> bool:
    """Move an earlier run's files that outlast a block to this run's folder.

    Returns whether the folders differ. `state` is the run's own folder in its output. Nothing is removed before
    everything is copied.
    """
    if before in (now, now.absolute()):
        return False
    if before == state:
        _copy(state, now)
        for path in _lasting(state):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True
    if not before.name.endswith(_ENDING):
        raise StateError(f"{state} names {before} as its scratch folder, which is none", "--no-resume starts over")
    with left_behind(before) as folder:
        if folder is not None:
            _copy(folder, now)
    return True


def drop_activations(progress: Path) -> None:
    """Remove the scratch folder that an unfinished run names, where it can be found."""
    try:
        before = Path(json.loads(progress.read_bytes())["scratch"])
        if before.name.endswith(_ENDING):
            with left_behind(before):
                pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ExportError):
        # Somebody else's, or damaged: starting over needs none of it.
        return


def check_activations(job: Job, layer: int) -> None:
    """Raise StateError where the hidden states before block `layer` are not there."""
    for model in job.models if job.samples is not None else ():
        path = job.hidden_path(layer, model)
        if not path.is_file():
            raise StateError(
                f"{path}: the unfinished run's activations are not there",
                "give the --scratch that it was started with, or --no-resume to start over",
            )


def _lasting(folder: Path) -> list[Path]:
    """Hidden states between blocks, and the measured importance of outputs."""
    return [*folder.glob("*.samples"), *folder.glob("outputs")]


def _copy(source: Path, target: Path) -> None:
    for path in _lasting(source):
        beside = target / f"{path.name}.new"
        with naming(beside):
            if path.is_dir():
                shutil.rmtree(beside, ignore_errors=True)
                shutil.copytree(path, beside)
                shutil.rmtree(target / path.name, ignore_errors=True)
            else:
                shutil.copyfile(path, beside)
            beside.replace(target / path.name)
