"""A worker of `quantize --cluster`, which solves blocks together with the others.

`cluster.session` places one on every node. Weights, samples and results go through files on the shared path; only
records and the board's short messages go through Ray.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qwen3_export.cluster.session import Handle
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.disk import naming_full
from qwen3_export.core.process import end_with_parent, trim_heap
from qwen3_export.core.processors import thread_count
from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import ExportError
from qwen3_export.solve.executor import PIECES, solve_block
from qwen3_export.solve.job import BlockRecord, Job, QuantizeSettings, SolvedBlock
from qwen3_export.solve.methods import load_method
from qwen3_export.solve.output_folder import STATE, QuantizedFolder
from qwen3_export.text.samples import Samples

if TYPE_CHECKING:
    from qwen3_export.solve.calibration.activations import SpareFiles


@dataclass(frozen=True)
class Run:
    """What a worker must know of the run; paths are valid on every node."""

    source: Path
    recipe: Recipe
    samples: Samples | None
    settings: QuantizeSettings
    partial: Path
    scratch: Path
    layout: str
    head_apart: bool
    without_torch: bool
    threads: int = 1

    @property
    def tried(self) -> set[Path]:
        """Folders in which every worker writes a file before the start.

        It shows that all nodes share them. A finished output holds none of these files, even after a kill meanwhile.
        """
        return {self.partial / STATE, self.scratch}


@dataclass(frozen=True)
class SearchRequest:
    """Schemes and samples that `recipes search` measures; see `mixed_precision.study`.

    `measure(checkpoint, method, options, pool, scratch, request)` is a function of a module that every node has: a
    cluster knows nothing of searches.
    """

    schemes: Mapping[Any, Sequence[QuantScheme]]
    calibration: Sequence[NDArray]
    held_out: Sequence[NDArray]
    measure: Callable[..., Any]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of a checkpoint's configuration, shard names and sizes; reads no weights."""
    shards = sorted({file.path for file in checkpoint.files.values()})
    lines = [f"{path.name} {path.stat().st_size}\n" for path in shards]
    configuration = (checkpoint.folder / "config.json").read_bytes()
    return hashlib.sha256(configuration + "".join(lines).encode()).hexdigest()


def arithmetic(device: str, without_torch: bool) -> dict[str, str]:
    """Versions and processor features that decide the bytes of a machine's results.

    Rounding to nearest without torch gives the same bytes on all processors, so it depends on versions alone.
    """
    known = {"qwen3-export": metadata.version("qwen3-export"), "numba": metadata.version("numba")}
    if without_torch:
        return known
    import torch

    from qwen3_export.model.workers import fast_matmul

    known["torch"] = str(torch.__version__).split("+")[0]
    if device != "cpu":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return {
            **known,
            "device": name,
            "capability": str(torch.cuda.is_available() and torch.cuda.get_device_capability()),
        }
    return {**known, "products": fast_matmul(), "vectors": str(torch.backends.cpu.get_cpu_capability())}


def boot_id() -> str:
    """An id that changes with every boot: files not flushed before may be lost."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Member:
    """The worker's actor; the board knows it by its `number`.

    Its errors reach the driver as they are (`cluster.session`).
    """

    def __init__(self, run: Run, number: int, board: Handle) -> None:
        end_with_parent()
        self._run, self._number, self._board = run, number, board
        self._stack = ExitStack()
        self._job: Job | None = None
        self._solved: dict[int, SolvedBlock] = {}
        self._seconds = 0.0

    def look(self, token: str) -> dict[str, Any]:
        """Describe this node, and test that it reads the source and writes outputs."""
        run = self._run
        found: dict[str, Any] = {
            "host": socket.gethostname(),
            "boot": boot_id(),
            "process": os.getpid(),
            "arithmetic": arithmetic(run.settings.device, run.without_torch),
        }
        try:
            found["source"] = fingerprint(open_checkpoint(run.source))
        except (ExportError, OSError) as error:
            found["source"] = str(error)
        try:
            for folder in run.tried:
                (folder / token).read_text()
                (folder / f"{token}.{self._number}").write_text(token)
        except OSError as error:
            found["output"] = str(error)
        return found

    def solve(self, layer: int, fisher: bool) -> BlockRecord:
        """Solve a block together with the other workers; returns its record."""
        with naming_full(self._run.scratch):
            job, folder = self._opened(fisher), self._run.scratch / PIECES / f"{layer:04d}"
            job.pool.begin(folder)  # type: ignore[attr-defined]
            self._solved = {}
            trim_heap()
            started = time.monotonic()
            spare = self._spare_files(folder / "spare")
            self._solved = {layer: solve_block(replace(job, apart=f"-{layer:04d}", spare_files=spare), layer)}
        self._seconds += time.monotonic() - started
        return self._solved[layer].record

    def _spare_files(self, folder: Path) -> SpareFiles:
        from qwen3_export.solve.cluster.spare_files import SharedSpareFiles

        return SharedSpareFiles(folder, lambda: bool(self._board.ask("calm")))

    def write(self, layer: int) -> None:
        """Write the shard of the block that was just solved."""
        with naming_full(self._run.partial):
            self._target().write_block(layer, self._solved.pop(layer))

    def solve_alone(self, layer: int) -> BlockRecord:
        """Solve and write a block that does not depend on any other."""
        started, job = time.monotonic(), self._opened(False)
        solved = solve_block(job, layer)
        with naming_full(self._run.partial):
            self._target().write_block(layer, solved)
        trim_heap()
        self._seconds += time.monotonic() - started
        return solved.record

    def account(self) -> dict[str, Any]:
        """Peak memory of this process, and the seconds and bytes of its shared work."""
        spent = getattr(self._job.pool, "spent", {}) if self._job else {}
        shared = {label: asdict(item) for label, item in spent.items()}
        return {"peak_rss_bytes": peak_rss_bytes(), "seconds": self._seconds, "shared": shared}

    def _target(self) -> QuantizedFolder:
        run = self._run
        return QuantizedFolder(run.partial, self._opened(False).checkpoint, run.layout, {}, run.head_apart)

    def _opened(self, fisher: bool) -> Job:
        """The job with this process's pool of threads.

        It is made once, and gets the importance of outputs when the driver has measured that (`fisher`).
        """
        if self._job is None:
            run = self._run
            method, options = load_method(run.recipe)
            pool = self._stack.enter_context(self._workers(fast=True))
            self._job = Job(
                open_checkpoint(run.source), run.recipe, method, options, run.samples, pool,
                run.scratch, run.settings.device, without_torch=run.without_torch,
            )  # fmt: skip
        if fisher and self._job.fisher is None:
            from qwen3_export.solve.calibration.fisher import found_fisher

            self._job = replace(self._job, fisher=found_fisher(self._job.scratch))
        return self._job

    def search(self, request: SearchRequest) -> Any:
        """Measure the sensitivities of all units together with the other workers."""
        method, options = load_method(self._run.recipe)
        checkpoint, scratch = open_checkpoint(self._run.source), self._run.scratch
        with naming_full(scratch), self._workers(fast=False) as pool:
            pool.begin(scratch / PIECES)
            return request.measure(checkpoint, method, options, pool, scratch, request)

    def _workers(self, fast: bool) -> Any:
        from qwen3_export.model.workers import workers, workers_without_torch
        from qwen3_export.solve.cluster.shared_workers import shared

        threads = min(self._run.threads, thread_count())
        if self._run.without_torch:
            return workers_without_torch(threads)
        more = partial(self._more, threads)
        return shared(workers(threads, fast=fast), more, self._barrier)

    def _barrier(self, key: str) -> None:
        self._board.ask("barrier", key, self._number)

    def _more(self, threads: int, key: str, count: int, done: Any, evenly: bool) -> list[int]:
        found: list[int] = self._board.ask("more", key, count, self._number, list(done), evenly, threads)
        return found
