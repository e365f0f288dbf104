"""A lab of devices: artifacts validated and timed on nodes of a Ray cluster.

    one task per artifact and label ─▶ a node that offers the label as a resource ─▶ one report of all

A label's amount on a node is the number of tasks that run there at a time: with
`ray start --resources='{"jetson": 1}'` no other task disturbs a measurement. Artifacts and reference lie on a path that
every node sees.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.cluster.session import Handle, LostWorkerError, RaySession, local_workers, open_session
from qwen3_export.core.process import end_with_parent
from qwen3_export.core.processors import thread_count
from qwen3_export.core.progress import Progress
from qwen3_export.errors import ExportError, InputError, ResourceError
from qwen3_export.prove.environment import environment
from qwen3_export.prove.failed import expected, failure, first_error
from qwen3_export.prove.latency import Workload, bench, judged
from qwen3_export.prove.tasks import Task
from qwen3_export.prove.validate import open_reference, validate
from qwen3_export.run.session import RuntimeOptions

# After so many seconds without a measurement that runs, it is said what is waited for.
_SAID_AFTER_SECONDS = 15


@dataclass(frozen=True)
class DriftRequest:
    """Arguments of `validate` for a node; see `prove.validate`."""

    reference: str
    texts: tuple[str, ...]
    tokens: int | None
    thinking_budget: int | None
    limits: Mapping[str, float]
    options: RuntimeOptions
    on: str
    tasks: Sequence[Task]
    explained: bool

    def measure(self, artifact: Path) -> dict[str, Any]:
        """Measure one artifact's drift in this process."""
        reference = open_reference(self.reference, self.texts, self.tokens, None, self.thinking_budget)
        return validate([artifact], reference, self.limits, self.options, None, self.on, self.tasks, self.explained)


@dataclass(frozen=True)
class LatencyRequest:
    """Arguments of `bench` for a node; `limits` are those on latency."""

    workload: Workload
    limits: Mapping[str, float]

    def measure(self, artifact: Path) -> dict[str, Any]:
        """Measure one artifact's latency on this machine."""
        return judged(bench([artifact], self.workload), self.limits)


class Device:
    """The actor on a node, which measures one artifact."""

    def __init__(self) -> None:
        end_with_parent()

    def start(self) -> None:
        """Answered as soon as this process runs."""

    def measure(self, artifact: Path, request: DriftRequest | LatencyRequest) -> Any:
        """Measure; returns the host's name, and a result or an error's parts."""
        name = socket.gethostname()
        try:
            if not artifact.exists():
                raise InputError(f"{artifact} is not there", "put artifacts on a path that every node sees alike")
            return name, request.measure(artifact)
        except Exception as error:
            return name, failure(artifact, expected(artifact, error))


def measure_on_nodes(
    address: str, labels: Sequence[str], artifacts: Sequence[Path], request: DriftRequest | LatencyRequest,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure every artifact on a node of every label; without labels, on any node.

    Returns `{results, failed, passed, environment}`; each result names its `node` and the `environment` there, and an
    error names its node. Raises InputError for a label that no node offers, and the error of a single task.
    """
    tasks = [(artifact.absolute(), label) for label in (labels or [""]) for artifact in artifacts]
    with open_session(address, local_workers(address) or thread_count()) as session:
        _check_nodes(session, labels)
        devices = [_start(session, label) for _, label in tasks]
        with progress.bar("measure on nodes", len(tasks)) as tick:
            found = _measured(session, devices, tasks, request, progress, tick)
    answers = [found[number] for number in range(len(tasks))]
    results, failed = ([item for item in answers if ("error" in item) is wrong] for wrong in (False, True))
    passed = not failed and all(item.get("gate", {}).get("passed", True) for item in results)
    result = {"results": results, "failed": failed, "passed": passed, "environment": environment()}
    if len(tasks) == 1 and (error := first_error(result)):
        raise error
    return result


def _check_nodes(session: RaySession, labels: Sequence[str]) -> None:
    """Raise InputError where no node can ever take a task."""
    nodes = session.nodes()
    if not labels and not any(node.cpus >= 1 for node in nodes):
        raise InputError(
            "no node of the cluster offers a CPU, which a measurement takes",
            "ray start --num-cpus=N sets what a node offers; or name devices by --node LABEL",
        )
    offered = sorted({label for node in nodes for label in node.labels})
    for label in labels:
        if label not in offered:
            raise InputError(
                f"--node {label}: no node of the cluster offers that"
                + (f"; there are {', '.join(offered)}" if offered else ""),
                f"on the device: ray start --address=HOST:PORT --resources='{{\"{label}\": 1}}'",
            )


def _measured(
    session: RaySession, devices: Sequence[Handle], tasks: Sequence[tuple[Path, str]],
    request: DriftRequest | LatencyRequest, progress: Progress, tick: Callable[[], None],
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Results and errors by the task's number.

    One artifact may be asked for several times.
    """
    started = [device.call("start") for device in devices]
    calls = {devices[number].call("measure", task[0], request): number for number, task in enumerate(tasks)}
    found, is_told = dict[int, dict[str, Any]](), False
    while len(found) < len(tasks):
        ready = session.answers(list(calls), None if is_told else _SAID_AFTER_SECONDS)
        if not ready and not is_told and not any(session.answers([started[number]], 0) for number in calls.values()):
            wanted = " or ".join(dict.fromkeys(tasks[number][1] or "CPU" for number in calls.values()))
            progress.note(f"waiting for a node with a free {wanted}: other work uses them (see ray status)")
            is_told = True
        for call in ready:
            number = calls.pop(call)
            found[number] = _answer(session, call, *tasks[number])
            session.end([devices[number]])
            tick()
    return found


def _start(session: RaySession, label: str) -> Handle:
    return session.place(Device, (), resources={label: 1.0}) if label else session.place(Device, (), cpus=1)


def _answer(session: RaySession, call: Any, artifact: Path, label: str) -> dict[str, Any]:
    """The result of one task or its entry of `failed`, with its node."""
    try:
        name, answer = session.answer(call)
    except LostWorkerError:
        lost = ResourceError(
            f"{artifact}: the node that measured it was lost" + (f" ({label})" if label else ""),
            "ray status shows which nodes are there",
        )
        return {**failure(artifact, lost), "node": {"name": None, "label": label or None}}
    except ExportError as error:
        return {**failure(artifact, error), "node": {"name": None, "label": label or None}}
    node = {"name": name, "label": label or None}
    if "error" in answer:
        return {**answer, "error": f"{label or name}: {answer['error']}", "node": node}
    (result,) = answer["results"]
    return {**result, "node": node, "environment": answer["environment"]}
