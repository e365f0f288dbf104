"""How a session with Ray starts: with which settings, and what is said where it does not."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray  # noqa: TID251  (its start is watched)
from ray.exceptions import RayTaskError  # noqa: TID251  (what it makes of errors)

from qwen3_export.cluster import head
from qwen3_export.cluster.session import LostWorkerError, RaySession, open_session
from qwen3_export.errors import ExportError, MissingRuntimeError, ResourceError, StateError

HERE, THERE = "leave --cluster away", "RAY_AUTH_MODE=token"
NOT_STARTED: list[tuple[str, Exception, type[ExportError], str]] = [
    ("local", RuntimeError("The node did not start in time.\nmore"), MissingRuntimeError, HERE),
    ("local:2", OSError(11, "Resource temporarily unavailable"), MissingRuntimeError, HERE),
    ("local", OSError(12, "Cannot allocate memory"), ResourceError, "close other programs"),
    ("auto", ConnectionError("Could not find any running Ray instance."), MissingRuntimeError, THERE),
]


@pytest.mark.parametrize(("address", "said", "kind", "hint"), NOT_STARTED)
def test_what_helps_a_cluster_to_start_is_said(
    monkeypatch: pytest.MonkeyPatch, address: str, said: Exception, kind: type[ExportError], hint: str
) -> None:
    """Nothing of other nodes and tokens, where the cluster is this machine."""

    def fail(**_: Any) -> None:
        raise said

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(kind, match=f"--cluster {address}") as caught, open_session(address):
        pass
    assert hint in str(caught.value.hint)
    assert ("token" in str(caught.value.hint)) == (address == "auto")


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device", "/shared/out.partial/a.new"),
        OSError(errno.ESTALE, "Stale file handle", "/shared/a"),
        MemoryError("Unable to allocate 8.00 GiB"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        StateError("a file is damaged", "remove it"),
        LostWorkerError("the board"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_worker_comes_home_as_it_is(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own classes, and through its pickles."""
    sent = pickle.loads(pickle.dumps(RayTaskError("solve", "Traceback", raised, "worker", 1, "127.0.0.1")))

    def get(*_: Any, **__: Any) -> None:
        raise sent.as_instanceof_cause()

    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(type(raised)) as caught:
        RaySession().answer(None)
    found = caught.value
    assert (type(found), str(found), vars(found)) == (type(raised), str(raised), vars(raised))
    for name in ("errno", "filename"):
        assert getattr(found, name, None) == getattr(raised, name, None)


def test_a_lost_head_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the calls are not answered; a head that listens again is none."""
    monkeypatch.setattr(head, "_LOST_SECONDS", 1)

    def wait(calls: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        time.sleep(0.2)
        return [], calls

    monkeypatch.setattr(ray, "wait", wait)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        with pytest.raises(ResourceError, match="has not answered for 6 s"):
            RaySession().answer(None, 6)
    for asked in (lambda: RaySession().answer(None), lambda: RaySession().answers([None]), RaySession().nodes):
        with pytest.raises(head.LostHeadError, match=f"the head of the Ray cluster, {address}, was lost"):
            asked()


def test_a_lost_raylet_is_told_before_ray_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    place = tempfile.mkdtemp(dir="/tmp", prefix="c")
    store = f"{place}/store"
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(ray, "get", lambda _: "answer")
    monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(plasma_store_socket_name=store))
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(store)
            server.listen()
            assert RaySession().answer(None) == "answer"
        for _ in range(2):
            with pytest.raises(head.LostHeadError, match="Ray's process on this machine"):
                RaySession().answer(None)
            Path(store).unlink(missing_ok=True)
    finally:
        shutil.rmtree(place)


def test_a_file_size_limit_below_rays_store_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200 << 10, 200 << 10))
    with (
        pytest.raises(ResourceError, match=r"local:1: Ray keeps a file of .* larger than 200 KiB"),
        open_session("local:1"),
    ):
        pass


def test_rays_store_is_small_and_spills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with open_session("local:2", 2):
        pass
    assert given["object_store_memory"] == 100 << 20
    assert given["_system_config"] == {"automatic_object_spilling_enabled": False}
    assert given["include_dashboard"] is False
    assert not Path(given["_temp_dir"]).exists()


HOLD = """
import sys
from qwen3_export.cluster.folder import ray_folder
with ray_folder() as folder:
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_the_next_cluster_removes_what_a_killed_command_left(tmp_path: Path) -> None:
    """And nothing else: neither the folder of a running one, nor one with a like name, nor through a link."""
    place = Path(tempfile.mkdtemp(dir="/tmp", prefix="c"))
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(place)},
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        killed, running = [Path(str(one.stdout and one.stdout.readline()).strip()) for one in holders]
        assert killed.parent == running.parent == place
        holders[0].kill()
        holders[0].wait(30)
        (place / "q3e-other").mkdir()
        (place / "q3e-link").symlink_to(shutil.copytree(killed, tmp_path / "q3e-elsewhere"))
        third = subprocess.run(
            [sys.executable, "-c", HOLD], input="\n", capture_output=True, text=True,
            env={**os.environ, "TMPDIR": str(place)}, check=True,
        )  # fmt: skip
        assert {path.name for path in place.iterdir()} == {running.name, "q3e-other", "q3e-link"}
        assert (tmp_path / "q3e-elsewhere").is_dir()
        assert not Path(third.stdout.strip()).exists()
    finally:
        for one in holders:
            one.kill()
            one.wait(30)
        shutil.rmtree(place)
