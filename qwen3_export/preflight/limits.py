"""What a run needs, beside the memory and disks that there are.

This machine's memory and disks count where the run would be here. A plan for other machines, with `--memory` or for
several nodes, is judged by what its options name: a limit of memory, a place on a disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_export.core.disk import Room, nearest, room_of, stored_bytes
from qwen3_export.core.outputs import partial_path
from qwen3_export.core.units import binary_size
from qwen3_export.core.working_folders import activations_path, quantized_path
from qwen3_export.preflight.formats import Verdict
from qwen3_export.solve.job import QuantizeSettings


@dataclass(frozen=True)
class Needs:
    """Peak memory of a run in bytes, its files' bytes, its time in seconds.

    None where nothing was computed or timed. Exports are written from the quantized folder, when its activations are
    gone.
    """

    peak_rss_bytes: int | None = None
    artifact_bytes: int | None = None
    activation_bytes: int = 0
    export_bytes: int = 0
    seconds: float | None = None

    @property
    def disk_bytes(self) -> int | None:
        """Bytes of all files at their fullest."""
        later = max(self.activation_bytes, self.export_bytes)
        return None if self.artifact_bytes is None else self.artifact_bytes + later


def memory_limits(needs: Needs, settings: QuantizeSettings, free: int | None) -> list[str]:
    """Too little memory: what `--memory` allows, or else what this machine has free."""
    if needs.peak_rss_bytes is None or not (there := _too_little(needs.peak_rss_bytes, settings, free)):
        return []
    return [f"about {binary_size(needs.peak_rss_bytes)} of memory are needed, {there}"]


def with_exports(needs: Needs, verdicts: Sequence[Verdict]) -> Needs:
    """The needs, those of exports and of what they build included."""
    peaks = [peak for verdict in verdicts for _, peak in _peaks(verdict)]
    peak = None if needs.peak_rss_bytes is None else max(needs.peak_rss_bytes, *peaks, 0)
    return replace(needs, export_bytes=sum(verdict.bytes or 0 for verdict in verdicts), peak_rss_bytes=peak)


def build_limits(found: Mapping[str, Verdict], settings: QuantizeSettings, free: int | None) -> dict[str, Verdict]:
    """The formats' verdicts, where writing or building one has too little memory too."""
    limited = dict(found)
    for name, verdict in found.items():
        for work, needed in _peaks(verdict):
            if there := _too_little(needed, settings, free):
                reason = f"{work} it takes about {binary_size(needed)} of memory, {there}"
                limited[name] = replace(verdict, reason=reason, note=None)
    return limited


def _peaks(verdict: Verdict) -> list[tuple[str, int]]:
    """Peak memory of writing and of building a format, where they are known."""
    written = [] if verdict.peak_rss_bytes is None else [("writing", verdict.peak_rss_bytes)]
    return written + ([("building", int(verdict.build["peak_rss_bytes"]))] if verdict.build else [])


def _too_little(needed: int, settings: QuantizeSettings, free: int | None) -> str | None:
    """What memory there is, where less than is needed; else None."""
    if settings.memory is not None:
        return f"--memory allows {binary_size(settings.memory)}" if needed > settings.memory else None
    if free is not None and needed > free:
        return f"{binary_size(free, up=False)} are free here; --memory says what another machine has"
    return None


def disks_of(needs: Needs, settings: QuantizeSettings, nodes: int, output: Path | None) -> list[Room]:
    """The disks of this machine that the run writes to.

    Without `output`, an absolute path, its result goes to the current folder. Files of an unfinished run, which a next
    one takes over, need no more room. Exports come after solving, so each disk must have the room for either.
    """
    if needs.artifact_bytes is None:
        return []
    here, scratch = settings.memory is None and nodes == 1, settings.scratch
    solving: dict[Path, int] = {}
    exporting: dict[Path, int] = {}
    if output is not None or here:
        place = Path.cwd() if output is None else output.parent
        written = needs.artifact_bytes - _present(output, needs.export_bytes > 0)
        solving[place] = written + (needs.activation_bytes if scratch is None else 0)
        exporting[place] = written + needs.export_bytes
    if scratch is not None:
        present = 0 if output is None else _stored(activations_path(scratch, output))
        spills = scratch.absolute()
        solving[spills] = solving.get(spills, 0) + needs.activation_bytes - present
    later = {_device(room.folder): room for room in room_of(exporting)} if needs.export_bytes else {}
    return [max(room, later.get(_device(room.folder), room), key=lambda one: one.needed) for room in room_of(solving)]


def disk_limits(needs: Needs, disks: list[Room], settings: QuantizeSettings) -> list[str]:
    """Disks that have too little room."""
    remedy = "--output says where else the result goes"
    if settings.scratch is None and needs.activation_bytes:
        remedy += f", --scratch where the activations do ({binary_size(needs.activation_bytes)})"
    elif settings.scratch is not None:
        remedy += ", --scratch where the activations do"
    return [
        f"about {binary_size(disk.needed)} of disk are needed, {binary_size(disk.free, up=False)} are free in "
        f"{disk.folder}; {remedy}"
        for disk in disks
        if not disk.suffices
    ]


def described(disks: list[Room]) -> list[dict[str, Any]]:
    """The disks as `--json` prints them."""
    return [{"path": str(disk.folder), "bytes": max(0, disk.needed), "free_bytes": disk.free} for disk in disks]


def _device(folder: Path) -> int:
    return os.stat(nearest(folder)).st_dev


def _present(output: Path | None, exports: bool) -> int:
    """Bytes of an unfinished run: in OUTPUT.partial, and in an export's copy beside it."""
    if output is None:
        return 0
    return _stored(partial_path(output)) + (_stored(quantized_path(output)) if exports else 0)


def _stored(folder: Path) -> int:
    return stored_bytes(folder) if folder.is_dir() else 0
