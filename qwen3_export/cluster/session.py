"""A session with Ray: nodes, actors placed on them, and their calls.

A cluster started here sends no usage statistics, opens no dashboard, and leaves Ray's output in its log files. Messages
are small, so its object store has 100 MB and never spills to disk.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qwen3_export.cluster.address import check_reachable, parsed
from qwen3_export.cluster.folder import ray_folder
from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.process import uncollected, uninterrupted
from qwen3_export.errors import InputError, MissingRuntimeError, ResourceError

STORE_BYTES = 100 << 20
# Seconds to wait for a process to end.
_END_SECONDS = 10
# Environment variables of Ray's authentication: `token` or `disabled`, and the token.
_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
# Remedies where Ray's processes do not start: on this machine alone, and on a cluster.
LOCAL_HINT = "Ray lacks memory, processes (ulimit -u) or room for temporary files here: leave --cluster away or give it"
_JOIN_HINT = (
    "run on a node of the cluster (ray start --address=HOST:PORT), with the same versions of Python and ray; "
    "if the cluster has a token, with RAY_AUTH_MODE=token and that token in ~/.ray/auth_token"
)
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would kill workers when memory is short; the run has a memory limit of its own.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    # Ray would give workers a niceness of 15, so that every other process of the machine comes first.
    "RAY_worker_niceness": "0",
}


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

        where: Any = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory or None, "resources": dict(resources or {})}
        options = {**asked, "max_restarts": 0, "scheduling_strategy": where, "max_concurrency": together}
        if environment:
            options["runtime_env"] = {"env_vars": dict(environment)}
        return Handle(ray.remote(kind).options(**options).remote(*arguments))

    def answers(self, calls: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Wait until a call finishes; a list of that one, or empty after `seconds`."""
        import ray

        ready, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
        return list(ready)

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


def _get(call: Any, seconds: float | None = None) -> Any:
    import ray
    from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RaySystemError, RayTaskError

    try:
        return ray.get(call, timeout=seconds)
    except RayTaskError as error:
        # Ray's own has the class of what the actor raised, but neither its errno nor its file.
        raise error.cause from error
    except GetTimeoutError as error:
        raise ResourceError(
            f"a worker on the cluster has not answered for {seconds:.0f} s",
            "ray status shows what its nodes are busy with",
        ) from error
    except ActorDiedError as error:
        if "creation task" in str(error) or "__init__" in str(error):
            reason = str(error).strip().splitlines()[-1]
            if lacks_memory(reason):
                raise out_of_memory("a node cannot start a worker", reason) from error
            raise MissingRuntimeError(
                f"a node cannot start a worker: {reason}",
                "other machines need the same version of qwen3-export with the extra `cluster`, this one memory",
            ) from error
        raise LostWorkerError(str(error)) from error
    except (RayActorError, RaySystemError) as error:
        raise LostWorkerError(str(error)) from error


@contextmanager
def open_session(address: str, workers: int = 1, gpus: int = 0) -> Iterator[RaySession]:
    """Attach to a cluster, or start one here with `workers` processors for `local`.

    Raises MissingRuntimeError without ray, or where no cluster answers.
    """
    check_cluster(address)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    is_local = local_workers(address) is not None
    if not is_local and address != "auto":
        check_reachable(address)
    with uninterrupted(), uncollected():
        import ray
    with ray_folder() if is_local else nullcontext() as folder:
        _connect(address, folder, workers, gpus)
        try:
            yield RaySession()
        finally:
            ray.shutdown()


def _connect(address: str, folder: str | None, workers: int, gpus: int) -> None:
    """Attach to a cluster, or start one whose files are in `folder`."""
    import ray
    from ray.exceptions import RayError

    is_local = folder is not None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    try:
        with uninterrupted(), _own_token() if is_local else nullcontext():
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


@contextmanager
def _own_token() -> Iterator[None]:
    """A token for a cluster that is started here.

    Ray would write one into the home folder, and from then on ask for it on clusters that the user starts.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    os.environ.setdefault(_TOKEN, _token())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@cache
def _token() -> str:
    """One for all clusters of this process, since Ray reads it once."""
    return secrets.token_hex(32)
