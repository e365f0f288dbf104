"""The judge: finds broken error contracts, changed inputs, files left behind, hangs."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tests.hostile.child import Outcome
from tests.hostile.trial import Trial

_STOPPED = (130, 129, -9, 4)


def snapshot(folder: Path) -> dict[str, str]:
    """Contents of files, targets of links and kinds of other things below a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            found[os.path.relpath(os.fsencode(path), os.fsencode(folder)).decode("utf-8", "backslashreplace")] = _of(
                path
            )
    return found


def _of(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)!r}"
    if stat.S_ISREG(status.st_mode):
        if status.st_size > 64 << 20:
            return f"file of {status.st_size} bytes, {status.st_mtime_ns}"
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except PermissionError:
            return f"file of {status.st_size} bytes"
    return "folder" if stat.S_ISDIR(status.st_mode) else "special"


def faults(trial: Trial, outcome: Outcome, folder: Path, before: dict[str, str]) -> list[str]:
    """Faults of a trial in words; empty when there are none."""
    if outcome.code is None or outcome.code == -24:
        return ["no end within the limits of time"]
    found = _manners(trial, outcome)
    found += _files(trial, outcome, folder, before)
    if not found and outcome.code == 0 and trial.check:
        try:
            trial.check()
        except AssertionError as error:
            found.append(f"wrong result: {error}")
    return found


def repeated(trial: Trial, outcome: Outcome, folder: Path, before: dict[str, str]) -> list[str]:
    """Faults of the command that follows a stopped one."""
    if outcome.code != 0:
        return [f"repeated: exit code {outcome.code} ({outcome.err[-300:]!r})"]
    return [f"repeated: {fault}" for fault in _files(trial, outcome, folder, before)]


def _manners(trial: Trial, outcome: Outcome) -> list[str]:
    found = []
    lines = outcome.err.splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    if outcome.code not in trial.codes:
        found.append(f"exit code {outcome.code} ({said[:200]})")
    if "Traceback" in outcome.err or "panicked at" in outcome.err:
        found.append(f"a traceback ({lines[-1][:200]})")
    if "error: unexpected" in outcome.err:
        found.append(f"{said[:300]}")
    errors = sum(line.startswith("error: ") for line in lines)
    quiet = trial.setup is not None  # its standard error may be what it took away
    if outcome.code in (2, 3, 4, 130) and errors != 1 and not quiet:
        found.append(f"{errors} error lines for code {outcome.code}: {outcome.err[-300:]!r}")
    if outcome.code == 0 and errors:
        found.append(f"code 0 and {said[:200]}")
    return found


def _files(trial: Trial, outcome: Outcome, folder: Path, before: dict[str, str]) -> list[str]:
    after, allowed = snapshot(folder), []
    if outcome.code in (0, 1) or (outcome.code == 130 and " is whole" in outcome.err):
        allowed += trial.outputs
    if outcome.code in _STOPPED:
        allowed += trial.keeps
    names = [str(path.relative_to(folder)) for path in allowed]

    def ours(name: str) -> bool:
        return any(name == one or name.startswith(f"{one}/") for one in names)

    lost = [name for name in before if name not in after and not ours(name)]
    changed = [name for name in before if name in after and after[name] != before[name] and not ours(name)]
    new = [name for name in after if name not in before and not ours(name)]
    found = [
        f"{word}: {', '.join(group[:4])}"
        for word, group in (("an input is lost", lost), ("an input is changed", changed), ("left behind", new))
        if group
    ]
    missing = [path.name for path in trial.outputs if outcome.code == 0 and not os.path.lexists(path)]
    return [*found, *(f"code 0, but no {name}" for name in missing)]
