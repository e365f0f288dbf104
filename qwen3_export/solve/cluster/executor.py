"""The driver of `quantize --cluster`: starts workers, gives them blocks, replaces lost ones."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from qwen3_export.cluster.session import LOCAL_HINT, Handle, LostWorkerError, Node, RaySession
from qwen3_export.core.outputs import write_atomic
from qwen3_export.core.process import ONE_HEAP
from qwen3_export.core.progress import Progress
from qwen3_export.errors import MissingRuntimeError, ResourceError
from qwen3_export.solve.cluster.member import Member, Run, SearchRequest
from qwen3_export.solve.executor import PIECES
from qwen3_export.solve.job import BlockRecord, Job
from qwen3_export.solve.output_folder import PROGRESS, STATE, QuantizedFolder

# After so many losses in a row without a finished piece, the run ends.
_MOST_LOSSES = 5
_START_SECONDS = 180
# File in the folder of the pieces that names the machines working on them (`Cluster.machines`).
MACHINES = "machines.json"


@dataclass
class _Worker:
    """A worker, its node, and the call that it is working on."""

    number: int
    node: Node
    handle: Handle
    call: Any = None
    layer: int = -1


@dataclass
class Cluster:
    """The executor (`solve.executor`) that has blocks solved by workers on a cluster."""

    session: RaySession
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
        """See `Executor`: one worker writes the block, since all hold the same result."""
        if job.samples is None:
            return
        while True:
            worker = self.workers[0]
            try:
                self.session.answer(worker.handle.call("write", layer))
                return
            except LostWorkerError as error:
                # The new worker reads the block from the finished pieces and solves nothing again.
                fresh = self._replace(worker, error)
                self.session.answer(fresh.handle.call("solve", layer, job.fisher is not None))

    def written(self, layer: int) -> None:
        """See `Executor`."""
        scratch = self.run.scratch
        shutil.rmtree(scratch / PIECES / f"{layer:04d}", ignore_errors=True)
        for folder in scratch.glob(f"*-states-{layer:04d}"):
            shutil.rmtree(folder, ignore_errors=True)

    def search(self, request: SearchRequest) -> list[Any]:
        """Sensitivities of all units, measured by all workers together.

        Raises ResourceError when a worker is lost, since a search keeps no intermediate results.
        """
        (self.run.scratch / PIECES).mkdir(exist_ok=True)
        self._ask_board("begin", len(self.workers))
        calls = {worker.handle.call("search", request): worker for worker in self.workers}
        answer: Any = []
        while calls:
            for call in self.session.answers(list(calls)):
                worker = calls.pop(call)
                try:
                    answer = self.session.answer(call)
                except LostWorkerError as error:
                    raise ResourceError(f"{worker.node.name}: the worker there was lost", self.after_loss()) from error
        return list(answer)

    def _solve_together(self, job: Job, layer: int) -> BlockRecord:
        """Solve one block on all workers together; returns when every worker has finished it."""
        pieces = self.run.scratch / PIECES
        is_new = not (pieces / f"{layer:04d}").exists()
        (pieces / f"{layer:04d}").mkdir(parents=True, exist_ok=True)
        write_atomic(pieces / MACHINES, json.dumps(self.machines))
        self._ask_board("begin", len(self.workers), is_new)
        fisher, record = job.fisher is not None, None
        for worker in self.workers:
            worker.call = worker.handle.call("solve", layer, fisher)
        while waiting := [worker for worker in self.workers if worker.call is not None]:
            ready = self.session.answers([worker.call for worker in waiting])
            for worker in (worker for worker in waiting if worker.call in ready):
                try:
                    record = self.session.answer(worker.call)
                    worker.call = None
                except LostWorkerError as error:
                    fresh = self._replace(worker, error)
                    fresh.call = fresh.handle.call("solve", layer, fisher)
        assert record is not None
        return record

    def _solve_alone(self, job: Job, layer: int) -> BlockRecord:
        """Wait for one block, while every other worker solves a later one."""
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
                    self.found[worker.layer] = self.session.answer(worker.call)
                    worker.call = None
                except LostWorkerError as error:
                    fresh = self._replace(worker, error)
                    fresh.layer, fresh.call = worker.layer, fresh.handle.call("solve_alone", worker.layer)
        return self.found.pop(layer)

    def start(self, nodes: list[Node]) -> list[dict[str, Any]]:
        """Place a worker on each node, and return what each reports of itself (`Member.look`).

        A node that is named several times gets several workers.
        """
        token, folders = f"shared-{uuid.uuid4().hex}", self.run.tried
        for folder in folders:
            folder.mkdir(exist_ok=True)
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
                LOCAL_HINT
                if self.is_local
                else "every node needs the same environment as this one, ray and qwen3-export in the same versions",
            ) from error

    def _place(self, node: Node) -> _Worker:
        """Start a worker on a node, a GPU, or beside others on this machine."""
        self.numbers += 1
        on_gpu = self.run.settings.device != "cpu"
        whole = max(1.0, node.cpus // max(node.gpus, 1)) if on_gpu else node.cpus
        arguments = (self.run, self.numbers, self.board)
        cpus, gpus = 1.0 if self.is_local else whole, 1.0 if on_gpu else 0.0
        handle = self.session.place(Member, arguments, node, cpus, gpus, self.needed, environment=ONE_HEAP)
        return _Worker(self.numbers, node, handle)

    def summary(self) -> list[dict[str, Any]]:
        """Node, memory, seconds and bytes of each worker, for the result."""
        found = []
        for worker in self.workers:
            # All work is done: a worker lost now does not matter.
            with suppress(LostWorkerError):
                found.append({"node": worker.node.name, **self.session.answer(worker.handle.call("account"))})
        return found

    def _ask_board(self, method: str, *arguments: Any) -> Any:
        try:
            return self.board.ask(method, *arguments)
        except LostWorkerError as error:
            raise ResourceError(
                "the process that shares out the work was lost",
                self.after_loss(),
            ) from error

    def after_loss(self) -> str:
        """What the same command does when this run has ended; see `output_folder.resumable`."""
        is_kept = (self.run.partial / STATE / PROGRESS).is_file()
        return "what is finished is kept: the same command goes on" if is_kept else "the same command starts over"

    def _replace(self, worker: _Worker, error: LostWorkerError) -> _Worker:
        """Replace a lost worker, on the same node or on a free one.

        Raises ResourceError when no node is left, or when workers are lost repeatedly and no piece gets done.
        """
        finished = self._ask_board("finished") + len(self.found)
        self.losses, self.last = (self.losses + 1 if finished == self.last else 1), finished
        if self.losses > _MOST_LOSSES:
            raise ResourceError(
                f"{worker.node.name}: workers were lost {self.losses} times and nothing got done between",
                f"perhaps their memory is too small; {self.after_loss()}",
            ) from error
        self._ask_board("lost", worker.number)
        alive = {node.id: node for node in self.session.nodes()}
        node = alive.get(worker.node.id) or next(iter(self._free(alive)), None)
        if node is None:
            raise ResourceError(
                f"{worker.node.name} is gone, and no other node of the cluster has room for its work",
                f"{self.after_loss()} when there are nodes again",
            ) from error
        self.progress.note(f"worker {worker.number} on {worker.node.name} was lost, another takes over its work")
        fresh = self._place(node)
        self.workers[self.workers.index(worker)] = fresh
        try:
            found = self.session.answer(fresh.handle.call("look", "none"), _START_SECONDS)
        except LostWorkerError as again:
            return self._replace(fresh, again)
        self.progress.log(f"worker {fresh.number} on {fresh.node.name}, process {found['process']}")
        return fresh

    def _free(self, alive: Mapping[str, Node]) -> list[Node]:
        taken = {worker.node.id for worker in self.workers}
        return [node for node in alive.values() if node.id not in taken and not lacking(node, self.needed, self.run)]


def lacking(node: Node, needed: int, run: Run) -> list[str]:
    """What a worker needs and a node does not have."""
    amounts = {
        "a CPU": node.cpus >= 1,
        "a GPU": run.settings.device == "cpu" or node.gpus >= 1,
        f"{needed / 2**30:.2f} GiB of memory": node.memory >= needed,
    }
    return [what for what, suffices in amounts.items() if not suffices]
