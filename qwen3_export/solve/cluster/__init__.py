"""`quantize --cluster`: the blocks of one run solved by workers on many nodes.

    driver   calibration text, embedding, importance of outputs, head, and the record of what is done
    workers  every one runs the same block at the same time (`member`), and shares its pieces with the others
             (`shared_workers`): forward passes of some samples, column strips of moments, rows of linears, experts
    board    which piece is whose (`cluster.board`)
    files    OUTPUT.partial/state/pieces/LLLL/…: what the pieces of block L have left; gone when the block is done

Pieces are cut by constants and put together in their order, as in a single process: the bytes are the same. Where the
method looks at no inputs, blocks do not depend on each other, and each worker solves whole blocks.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_export import errors
from qwen3_export.cluster.board import Board
from qwen3_export.cluster.session import Handle, LostWorkerError, Node, Session, local_workers, open_session
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.outputs import write_atomic
from qwen3_export.core.processors import MOST_THREADS, thread_count
from qwen3_export.core.progress import Progress
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError
from qwen3_export.solve.cluster.member import Member, Run, arithmetic, fingerprint
from qwen3_export.solve.executor import PIECES
from qwen3_export.solve.job import BlockRecord, Job
from qwen3_export.solve.output_folder import QuantizedFolder

# A worker that is lost so often while nothing gets done will be lost again.
_MOST_LOSSES = 5
_START_SECONDS = 180
# In the folder of the pieces: the machines that work on them, as `Cluster.machines`.
_MACHINES = "machines.json"
_SHARED = "put the source and --output on a path that all nodes see alike, such as NFS"


@dataclass
class _Worker:
    """A worker, the node it is on, and the call that it works on."""

    number: int
    node: Node
    handle: Handle
    call: Any = None
    layer: int = -1


@dataclass
class Cluster:
    """The executor of the block loop (`solve.executor`) that has workers."""

    session: Session
    run: Run
    needed: int
    progress: Progress
    is_local: bool
    board: Handle
    workers: list[_Worker] = field(default_factory=list)
    found: dict[int, BlockRecord] = field(default_factory=dict)
    machines: dict[str, str] = field(default_factory=dict)
    losses: int = 0
    last: int = 0
    numbers: int = 0

    def solve(self, job: Job, layer: int) -> BlockRecord:
        """See `Executor`."""
        return self._solve_alone(job, layer) if job.samples is None else self._solve_together(job, layer)

    def write(self, job: Job, target: QuantizedFolder, layer: int) -> None:
        """See `Executor`: the first worker that still has the block writes it."""
        if job.samples is None:
            return
        while True:
            worker = self.workers[0]
            try:
                self.session.answer(worker.handle.call("write", layer))
                return
            except LostWorkerError as error:
                # All pieces are there: the next one has the block without any work.
                fresh = self._replace(worker, error)
                self._checked(self.session.answer(fresh.handle.call("solve", layer, job.fisher is not None)))

    def written(self, layer: int) -> None:
        """See `Executor`."""
        scratch = self.run.scratch
        shutil.rmtree(scratch / PIECES / f"{layer:04d}", ignore_errors=True)
        for folder in scratch.glob(f"*-states-{layer:04d}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _solve_together(self, job: Job, layer: int) -> BlockRecord:
        """One block by all workers: each comes to its end."""
        pieces = self.run.scratch / PIECES
        (pieces / f"{layer:04d}").mkdir(parents=True, exist_ok=True)
        write_atomic(pieces / _MACHINES, json.dumps(self.machines))
        self.board.ask("begin", len(self.workers))
        fisher, record = job.fisher is not None, None
        for worker in self.workers:
            worker.call = worker.handle.call("solve", layer, fisher)
        while waiting := [worker for worker in self.workers if worker.call is not None]:
            ready = self.session.answers([worker.call for worker in waiting])
            for worker in (worker for worker in waiting if worker.call in ready):
                try:
                    record = self._checked(self.session.answer(worker.call))
                    worker.call = None
                except LostWorkerError as error:
                    fresh = self._replace(worker, error)
                    fresh.call = fresh.handle.call("solve", layer, fisher)
        assert record is not None
        return record

    def _solve_alone(self, job: Job, layer: int) -> BlockRecord:
        """A block, and as many more on the way as there are workers."""
        layers = job.checkpoint.config.num_layers
        upcoming = iter(range(max([layer - 1, *self.found, *(w.layer for w in self.workers)]) + 1, layers))
        while layer not in self.found:
            for worker in self.workers:
                if worker.call is None and (after := next(upcoming, None)) is not None:
                    worker.layer, worker.call = after, worker.handle.call("solve_alone", after)
            waiting = [worker for worker in self.workers if worker.call is not None]
            ready = self.session.answers([worker.call for worker in waiting])
            for worker in (worker for worker in waiting if worker.call in ready):
                try:
                    self.found[worker.layer] = self._checked(self.session.answer(worker.call))
                    worker.call = None
                except LostWorkerError as error:
                    fresh = self._replace(worker, error)
                    fresh.layer, fresh.call = worker.layer, fresh.handle.call("solve_alone", worker.layer)
        return self.found.pop(layer)

    def _checked(self, answer: Any) -> BlockRecord:
        """The record; raises what a worker could not do."""
        if isinstance(answer, BlockRecord):
            return answer
        kind, text, hint = answer
        raise getattr(errors, kind, ExportError)(text, hint)

    def start(self, nodes: list[Node]) -> list[dict[str, Any]]:
        """Place a worker on each node, and ask what they see.

        `nodes` may name one several times.
        """
        token, folders = f"shared-{uuid.uuid4().hex}", {self.run.partial, self.run.scratch}
        for folder in folders:
            (folder / token).write_text(token)
        try:
            self.workers = [self._place(node) for node in nodes]
            calls = [worker.handle.call("look", token) for worker in self.workers]
            seen: list[dict[str, Any]] = []
            for worker, call in zip(self.workers, calls, strict=True):
                found = self._first_answer(call, worker.node)
                wrote = all((folder / f"{token}.{worker.number}").exists() for folder in folders)
                seen.append({**found, "node": worker.node.name, "wrote": wrote})
                self.progress.log(f"worker {worker.number} on {worker.node.name}, process {found['process']}")
            return seen
        finally:
            for file in (file for folder in folders for file in folder.glob(f"{token}*")):
                file.unlink()

    def _first_answer(self, call: Any, node: Node) -> Any:
        try:
            return self.session.answer(call, _START_SECONDS)
        except LostWorkerError as error:
            raise MissingRuntimeError(
                f"{node.name}: a worker cannot be started there ({str(error).strip().splitlines()[-1]})",
                "every node needs the same environment as this one, ray and qwen3-export in the same versions",
            ) from error

    def _place(self, node: Node) -> _Worker:
        """A worker with a node, a GPU, or a part of this machine."""
        self.numbers += 1
        on_gpu = self.run.settings.device != "cpu"
        whole = max(1.0, node.cpus // max(node.gpus, 1)) if on_gpu else node.cpus
        arguments = (self.run, self.numbers, self.board)
        cpus, gpus = 1.0 if self.is_local else whole, 1.0 if on_gpu else 0.0
        return _Worker(self.numbers, node, self.session.place(Member, arguments, node, cpus, gpus, self.needed))

    def summary(self) -> list[dict[str, Any]]:
        """What the result says of the workers."""
        peaks = [self.session.answer(worker.handle.call("peak")) for worker in self.workers]
        pairs = zip(self.workers, peaks, strict=True)
        return [{"node": worker.node.name, "peak_rss_bytes": peak} for worker, peak in pairs]

    def _replace(self, worker: _Worker, error: LostWorkerError) -> _Worker:
        """Another worker in place of one that is lost.

        It is on the same node, or on another that has room.

        Raises ResourceError when workers are lost again and again while nothing gets done.
        """
        finished = self.board.ask("finished") + len(self.found)
        self.losses, self.last = (self.losses + 1 if finished == self.last else 1), finished
        if self.losses > _MOST_LOSSES:
            raise ResourceError(
                f"{worker.node.name}: workers were lost {self.losses} times and nothing got done between",
                "perhaps their memory is too small; what is finished is kept, the same command goes on",
            ) from error
        self.board.ask("lost", worker.number)
        alive = {node.id: node for node in self.session.nodes()}
        node = alive.get(worker.node.id) or next(iter(self._free(alive)), None)
        if node is None:
            raise ResourceError(
                f"{worker.node.name} is gone, and no other node of the cluster has room for its work",
                "what is finished is kept: the same command goes on when there are nodes again",
            ) from error
        self.progress.note(f"worker {worker.number} on {worker.node.name} was lost, another takes over its work")
        fresh = self._place(node)
        self.workers[self.workers.index(worker)] = fresh
        found = self.session.answer(fresh.handle.call("look", "none"), _START_SECONDS)
        self.progress.log(f"worker {fresh.number} on {fresh.node.name}, process {found['process']}")
        return fresh

    def _free(self, alive: Mapping[str, Node]) -> list[Node]:
        taken = {worker.node.id for worker in self.workers}
        return [node for node in alive.values() if node.id not in taken and _fits(node, self.needed, self.run)]


def _fits(node: Node, needed: int, run: Run) -> bool:
    return node.memory >= needed and node.cpus >= 1 and (run.settings.device == "cpu" or node.gpus >= 1)


@contextmanager
def open_cluster(address: str, run: Run, needed: int, checkpoint: Checkpoint, progress: Progress) -> Iterator[Cluster]:
    """Workers at ADDRESS, or started here for `local[:N]`, ready and alike.

    `needed` is the memory of each in bytes. Raises InputError where nodes differ or do not see the same files,
    ResourceError where no node has the memory, MissingRuntimeError where something is not installed.
    """
    count = local_workers(address)
    gpus = _gpus() if run.settings.device != "cpu" else 0
    threads = thread_count(run.settings.threads)
    total = count or gpus or threads
    run = replace(run, threads=max(1, threads // total) if count is not None else run.settings.threads or MOST_THREADS)
    with open_session(address, total, gpus) as session:
        board = session.place(Board, (), together=1000)
        cluster = Cluster(session, run, needed, progress, count is not None, board)
        places = _places(session.nodes(), total if count is not None else None, needed, run, progress)
        try:
            seen = cluster.start(places)
            _check_alike(seen, fingerprint(checkpoint), run)
            cluster.machines = _forget_after_restart(seen, run)
            yield cluster
        finally:
            session.end([worker.handle for worker in cluster.workers])


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _places(nodes: list[Node], local: int | None, needed: int, run: Run, progress: Progress) -> list[Node]:
    """The node of each worker.

    There is one for each node or GPU of a cluster; local ones are all on this machine.
    """
    if local is not None:
        (node,) = nodes
        if node.memory < local * needed:
            raise ResourceError(
                f"{local} workers need about {local * needed / 2**30:.2f} GiB of memory, "
                f"{node.memory / 2**30:.2f} GiB are free here",
                f"--cluster local:{max(1, node.memory // needed)}" if node.memory >= needed else None,
            )
        return [node] * local
    chosen = [node for node in nodes if _fits(node, needed, run)]
    for node in nodes:
        if node not in chosen:
            progress.note(
                f"{node.name} is left out: {node.cpus:g} CPUs, {node.gpus:g} GPUs, {node.memory / 2**30:.2f} GiB"
            )
    if not chosen:
        raise ResourceError(
            f"no node of the cluster has the {needed / 2**30:.2f} GiB of memory that a worker needs"
            + ("" if run.settings.device == "cpu" else ", and a GPU"),
            "qwen3-export plan says what a run needs; ray start --memory=BYTES sets what a node offers",
        )
    each = [max(1, int(node.gpus)) if run.settings.device != "cpu" else 1 for node in chosen]
    return [node for node, times in zip(chosen, each, strict=True) for _ in range(times)]


def _check_alike(seen: list[dict[str, Any]], source: str, run: Run) -> None:
    """Raise InputError for nodes with other files, or that would make other bytes."""
    here = arithmetic(run.settings.device, run.without_torch)
    for item in seen:
        if item["source"] != source:
            raise InputError(f"{item['node']} does not see {run.source} as this machine does", _SHARED)
        if not item["wrote"]:
            raise InputError(f"{item['node']} does not see {run.partial} as this machine does", _SHARED)
        for key, value in here.items():
            if item["arithmetic"].get(key) != value:
                raise InputError(
                    f"{item['node']} has another kind of arithmetic: {key} {item['arithmetic'].get(key)}, "
                    f"this machine {value}",
                    "bytes depend on it: give the cluster nodes of one kind, with the same versions",
                )


def _forget_after_restart(seen: list[dict[str, Any]], run: Run) -> dict[str, str]:
    """Remove pieces that a machine may not have flushed before it was started anew.

    Gives the machines that work on the run, with what changes when they are started.
    """
    pieces = run.scratch / PIECES
    now = {item["host"]: item["boot"] for item in seen}
    try:
        before = dict(json.loads((pieces / _MACHINES).read_text()))
    except (OSError, ValueError, TypeError):
        before = None
    if before is None or any(now.get(host, boot) != boot for host, boot in before.items()):
        shutil.rmtree(pieces, ignore_errors=True)
    return {**(before or {}), **now}


__all__ = ["Cluster", "Run", "open_cluster"]
