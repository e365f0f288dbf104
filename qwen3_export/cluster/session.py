"""A session with Ray: nodes, actors placed on them, and their calls.

A cluster started here sends no usage statistics, opens no dashboard, and leaves Ray's output in its log files. Messages
are small, so its object store has 100 MB and never spills to disk.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from qwen3_export.cluster.address import check_reachable, parsed
from qwen3_export.cluster.environment import VARIABLES, own_token
from qwen3_export.cluster.folder import ray_folder
from qwen3_export.cluster.head import check_head, check_store
from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.process import uncollected, uninterrupted
from qwen3_export.core.units import binary_size
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError

STORE_BYTES = 100 << 20
# Seconds to wait for a process to end, and for a call before it is asked whether the head still answers.
_END_SECONDS, _STEP_SECONDS = 10, 5
# Remedies where Ray's processes do not start: on this machine alone, and on a cluster.
LOCAL_HINT = (
    "Ray lacks memory, processes (ulimit -u), large files (ulimit -f) or room for temporary files here: "
    "leave --cluster away or give it"
)
_JOIN_HINT = (
    "run on a node of the cluster (ray start --address=HOST:PORT), with the same versions of Python and ray; "
    "if the cluster has a token, with RAY_AUTH_MODE=token and that token in ~/.ray/auth_token"
)


class LostWorkerError(Exception):
    """The worker's process or node is gone."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster and the resources that it offers."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory: int
    labels: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Handle:
    """A Ray actor: an object in a process of its own."""

    actor: Any

    def call(self, method: str, *arguments: Any) -> Any:
        """Start a call without waiting; `RaySession.answer` fetches its result."""
        return getattr(self.actor, method).remote(*arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call and wait for the result; LostWorkerError when the process is gone."""
        return _get(self.call(method, *arguments))


def check_cluster(address: str) -> None:
    """Raise MissingRuntimeError without ray, InputError for a malformed address."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingRuntimeError("--cluster needs ray", "pip install 'qwen3-export[cluster]'")
    if local_workers(address) is None and address != "auto":
        parsed(address)


def local_workers(address: str) -> int | None:
    """N of `local:N`, 0 for `local`, None for the address of a running cluster.

    Raises InputError when N is no number from 1 to 512.
    """
    word, _, count = address.partition(":")
    if word != "local":
        return None
    if count and not (count.isdecimal() and 1 <= int(count) <= 512):
        raise InputError(f"--cluster {address}: local, local:N with N from 1 to 512, or HOST:PORT was expected")
    return int(count) if count else 0


class RaySession:
    """A connection to a cluster; made by `open_session`."""

    def nodes(self) -> list[Node]:
        """All nodes that are alive, by name."""
        import ray

        _check_head()
        found = []
        for item in ray.nodes():
            if item["Alive"]:
                offers = item["Resources"]
                own = ("CPU", "GPU", "memory", "object_store_memory")
                labels = frozenset(
                    n for n in offers if n not in own and not n.startswith(("node:", "accelerator_type:"))
                )
                name = f"{item['NodeManagerHostname']} ({item['NodeManagerAddress']}, {item['NodeID'][:8]})"
                amounts = (offers.get("CPU", 0.0), offers.get("GPU", 0.0), int(offers.get("memory", 0)))
                found.append(Node(item["NodeID"], name, *amounts, labels))
        return sorted(found, key=lambda node: node.name)

    def place(
        self, kind: type, arguments: Sequence[Any], node: Node | None = None, cpus: float = 0, gpus: float = 0,
        memory: int = 0, together: int = 1, resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Handle:  # fmt: skip
        """Start an actor of class `kind`, on the given node if there is one.

        Up to `together` of its calls run at a time. Its process starts with the variables of `environment`.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        _check_head()
        where: Any = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory or None, "resources": dict(resources or {})}
        options = {**asked, "max_restarts": 0, "scheduling_strategy": where, "max_concurrency": together}
        if environment:
            options["runtime_env"] = {"env_vars": dict(environment)}
        return Handle(ray.remote(kind).options(**options).remote(*arguments))

    def answers(self, calls: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Wait until a call finishes; a list of that one, or empty after `seconds`."""
        return _wait(calls, seconds)

    def answer(self, call: Any, seconds: float | None = None) -> Any:
        """The result of a call, awaited; what it raises comes home as it is.

        Raises LostWorkerError when the process is gone, ResourceError when it takes too long.
        """
        return _get(call, seconds)

    def end(self, handles: Sequence[Handle]) -> None:
        """End actors and wait for their processes, so that none writes any more."""
        import ray

        for handle in handles:
            ray.kill(handle.actor, no_restart=True)
        for handle in handles:
            with suppress(LostWorkerError, ResourceError, MissingRuntimeError):
                _get(handle.actor.__ray_ready__.remote(), _END_SECONDS)


def _wait(calls: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """A finished call, awaited in short steps; empty after `seconds`.

    Raises LostHeadError when the head is lost meanwhile.
    """
    import ray

    deadline = math.inf if seconds is None else time.monotonic() + seconds
    while True:
        _check_node()
        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=min(_STEP_SECONDS, left))
        if ready or left <= _STEP_SECONDS:
            return list(ready)
        _check_head()


def _check_head() -> None:
    import ray

    check_head(ray.get_runtime_context().gcs_address)


def _check_node() -> None:
    """Raise LostHeadError when the raylet here is gone: Ray would end this process."""
    from ray._private import worker

    store = getattr(getattr(worker, "_global_node", None), "plasma_store_socket_name", None)
    if store is not None:
        check_store(store)


def _get(call: Any, seconds: float | None = None) -> Any:
    import ray
    from ray.exceptions import ActorDiedError, RayActorError, RaySystemError, RayTaskError

    if not _wait([call], seconds):
        raise ResourceError(
            f"a worker on the cluster has not answered for {seconds:.0f} s",
            "ray status shows what its nodes are busy with",
        )
    _check_node()
    try:
        return ray.get(call)
    except RayTaskError as error:
        # Ray's own has the class of what the actor raised, but neither its errno nor its file.
        raise error.cause from error
    except ActorDiedError as error:
        if "creation task" in str(error) or "__init__" in str(error):
            raise _cannot_start(str(error).strip().splitlines()[-1]) from error
        raise LostWorkerError(str(error)) from error
    except (RayActorError, RaySystemError) as error:
        raise LostWorkerError(str(error)) from error


def _cannot_start(reason: str) -> ExportError:
    if lacks_memory(reason):
        return out_of_memory("a node cannot start a worker", reason)
    return MissingRuntimeError(
        f"a node cannot start a worker: {reason}",
        "other machines need the same version of qwen3-export with the extra `cluster`, this one memory",
    )


@contextmanager
def open_session(address: str, workers: int = 1, gpus: int = 0) -> Iterator[RaySession]:
    """Attach to a cluster, or start one here with `workers` processors for `local`.

    Raises MissingRuntimeError without ray, or where no cluster answers.
    """
    check_cluster(address)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    is_local = local_workers(address) is not None
    if not is_local and address != "auto":
        check_reachable(address)
    with uninterrupted(), uncollected():
        import ray
    if is_local:
        _check_file_size(address)
    with ray_folder() if is_local else nullcontext() as folder:
        _connect(address, folder, workers, gpus)
        try:
            yield RaySession()
        finally:
            ray.shutdown()


def _check_file_size(address: str) -> None:
    """Raise ResourceError where Ray's object store may not get as large as it is."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < STORE_BYTES:
        raise ResourceError(
            f"--cluster {address}: Ray keeps a file of {binary_size(STORE_BYTES)}, and files may not get larger than "
            f"{binary_size(limit)} here",
            "raise the limit (ulimit -f unlimited), or leave --cluster away",
        )


def _connect(address: str, folder: str | None, workers: int, gpus: int) -> None:
    """Attach to a cluster, or start one whose files are in `folder`."""
    import ray
    from ray.exceptions import RayError

    is_local = folder is not None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    try:
        with uninterrupted(), own_token() if is_local else nullcontext():
            if is_local:
                ray.init(
                    address="local", num_cpus=workers, num_gpus=gpus, include_dashboard=False,
                    object_store_memory=STORE_BYTES, _temp_dir=folder, _node_ip_address="127.0.0.1",
                    _system_config={"automatic_object_spilling_enabled": False}, **quiet,
                )  # fmt: skip
            else:
                ray.init(address=address, **quiet)
    except Exception as error:
        # A node that is too slow to start is an Exception of no kind.
        if type(error) is not Exception and not isinstance(error, RuntimeError | OSError | ValueError | RayError):
            raise
        if lacks_memory(error):
            raise out_of_memory(f"--cluster {address}", error) from error
        raise MissingRuntimeError(
            f"--cluster {address}: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            LOCAL_HINT if is_local else _JOIN_HINT,
        ) from error
