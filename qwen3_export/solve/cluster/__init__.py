"""`quantize --cluster`: the blocks of one run solved by workers on many nodes.

    driver   does calibration text, embedding, importance of outputs and head; keeps the record of finished blocks
    workers  all solve the same block at the same time (`member`), and split its work into pieces (`shared_workers`):
             forward passes of some samples, column strips of moments, output rows of linears, experts
    board    assigns the pieces to workers (`cluster.board`)
    files    OUTPUT.partial/state/pieces/LLLL/… hold the results of block L's pieces until the block is done

The bytes are those of a single process, since pieces have fixed sizes and are combined in a fixed order. A method
without calibration makes blocks independent of each other: then each worker solves whole blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qwen3_export.cluster.board import Board
from qwen3_export.cluster.head import LostHeadError
from qwen3_export.cluster.session import Node, local_workers, open_session
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.processors import MOST_THREADS, thread_count
from qwen3_export.core.progress import Progress
from qwen3_export.errors import ClusterError, ExportError, ResourceError
from qwen3_export.solve.cluster.executor import MACHINES, Cluster, lacking
from qwen3_export.solve.cluster.member import Run, SearchRequest, arithmetic, fingerprint
from qwen3_export.solve.executor import PIECES
from qwen3_export.solve.job import QuantizeSettings

_SHARED = "put the source and --output on a path that all nodes see alike, such as NFS"


@contextmanager
def open_cluster(address: str, run: Run, needed: int, checkpoint: Checkpoint, progress: Progress) -> Iterator[Cluster]:
    """Start workers on the cluster at `address`, checked to give the same bytes.

    `needed` is the memory of each in bytes. Raises ClusterError where nodes differ or do not see the same files,
    or offer no CPU or GPU, ResourceError where no node has the memory, MissingRuntimeError where something is not
    installed.
    """
    count, threads = local_workers(address), thread_count(run.settings.threads)
    gpus = _gpus() if run.settings.device != "cpu" else 0
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
        except LostHeadError as error:
            raise ResourceError(str(error), cluster.after_loss()) from error
        finally:
            session.end([worker.handle for worker in cluster.workers])


def workers_here(address: str, settings: QuantizeSettings) -> int:
    """How many workers `--cluster` starts on this machine; 0 for a running cluster."""
    count = local_workers(address)
    if count is None:
        return 0
    return count or (_gpus() if settings.device != "cpu" else 0) or thread_count(settings.threads)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _places(nodes: list[Node], local: int | None, needed: int, run: Run, progress: Progress) -> list[Node]:
    """The node of each worker.

    A cluster has one worker per node or GPU; `local:N` has N on this machine. Raises ResourceError where memory does
    not suffice, ClusterError where no node offers a CPU, or a GPU.
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
    lacks = {node.id: lacking(node, needed, run) for node in nodes}
    chosen = [node for node in nodes if not lacks[node.id]]
    for node in nodes:
        if lacks[node.id]:
            offers = f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, {node.memory / 2**30:.2f} GiB"
            progress.note(f"{node.name} is left out: it lacks {' and '.join(lacks[node.id])} ({offers})")
    if not chosen:
        raise _none_fits(list(lacks.values()))
    each = [max(1, int(node.gpus)) if run.settings.device != "cpu" else 1 for node in chosen]
    return [node for node, times in zip(chosen, each, strict=True) for _ in range(times)]


def _none_fits(lacks: list[list[str]]) -> ExportError:
    """The error where every node lacks something that a worker needs."""
    everywhere = [what for what in lacks[0] if all(what in found for found in lacks)]
    wanted = everywhere or list(dict.fromkeys(what for found in lacks for what in found))
    kind = ResourceError if any("memory" in what for what in everywhere) else ClusterError
    options = {"a CPU": "--num-cpus=N", "a GPU": "--num-gpus=N"}
    offers = ", ".join(options.get(what, "--memory=BYTES") for what in wanted)
    return kind(
        f"no node of the cluster offers {' and '.join(wanted)}{'' if everywhere else ' together'}, "
        "which a worker needs",
        f"ray start {offers} sets what a node offers; qwen3-export plan says what a run needs",
    )


def _check_alike(seen: list[dict[str, Any]], source: str, run: Run) -> None:
    """Raise ClusterError for nodes that see other files or would compute other bytes."""
    here = arithmetic(run.settings.device, run.without_torch)
    for item in seen:
        if item["source"] != source:
            raise ClusterError(f"{item['node']} does not see {run.source} as this machine does", _SHARED)
        if not item["wrote"]:
            raise ClusterError(f"{item['node']} does not see {run.partial} as this machine does", _SHARED)
        for key, value in here.items():
            if item["arithmetic"].get(key) != value:
                raise ClusterError(
                    f"{item['node']} has another kind of arithmetic: {key} {item['arithmetic'].get(key)}, "
                    f"this machine {value}",
                    "bytes depend on it: give the cluster nodes of one kind, with the same versions",
                )


def _forget_after_restart(seen: list[dict[str, Any]], run: Run) -> dict[str, str]:
    """Remove unfinished pieces if a machine was rebooted, which may have lost its own.

    Returns the boot id of each machine that works on the run.
    """
    pieces = run.scratch / PIECES
    now = {item["host"]: item["boot"] for item in seen}
    try:
        before = dict(json.loads((pieces / MACHINES).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        before = None
    if before is None or any(now.get(host, boot) != boot for host, boot in before.items()):
        shutil.rmtree(pieces, ignore_errors=True)
    return {**(before or {}), **now}


__all__ = ["Cluster", "Run", "SearchRequest", "open_cluster", "workers_here"]
