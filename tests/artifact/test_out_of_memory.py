"""Artifacts in too little memory: every runtime's failed allocation is the same error, exit code 4."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.prove import latency
from qwen3_export.prove.latency import Workload
from qwen3_export.run.batch import batch_of
from qwen3_export.run.llamacpp import interface
from qwen3_export.run.ort import OrtSession
from qwen3_export.run.parted import PartedModel
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx

IDS = np.arange(8, dtype=np.int32)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> dict[str, Path]:
    base, folder = tmp_path_factory.mktemp("starved"), source("gptq-w4a16-g128")
    checkpoint = open_source(str(folder))
    export_onnx(checkpoint, base / "fused")
    export_onnx(checkpoint, base / "standard", flavor="standard")
    export_gguf(checkpoint, base / "model.gguf", "q4_0")
    return {"folder": folder, "fused": base / "fused", "standard": base / "standard", "gguf": base / "model.gguf"}


@pytest.mark.parametrize("kind", ["folder", "fused", "standard", "gguf"])
def test_whatever_room_there_is_it_runs_or_says_that_memory_is_short(artifacts: dict[str, Path], kind: str) -> None:
    """The runtimes themselves, in processes that may map ever more memory."""
    command = [sys.executable, "-m", "tests.artifact.starved", str(artifacts[kind])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert {item["code"] for item in found} == {0, 4}, found
    assert (found[0]["code"], found[-1]["code"]) == (4, 0)
    assert all("out of memory (" in item["text"] for item in found if item["code"])


def raising(error: Exception) -> Callable[..., Any]:
    def run(*_: object, **__: object) -> Any:
        raise error

    return run


# Words of ONNX Runtime, which are two kinds of error.
SAID: list[tuple[Exception, type[Exception]]] = [
    (RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"), ResourceError),
    (MemoryError("Unable to allocate 1.86 MiB"), ResourceError),
    (RuntimeError("[ONNXRuntimeError] : 1 : FAIL : a shape differs"), InputError),
]


@pytest.mark.parametrize(("said", "kind"), SAID, ids=["runtime", "python", "shape"])
def test_a_batch_tells_memory_from_the_rest(artifacts: dict[str, Path], said: Exception, kind: type[Exception]) -> None:
    session = OrtSession(artifacts["fused"], RuntimeOptions(threads=1))
    batch = batch_of(session, 2)
    batch.admit(IDS)
    session._session = SimpleNamespace(run_with_iobinding=raising(said))
    with pytest.raises(kind):
        batch.step([1])


@pytest.mark.parametrize(("said", "kind"), SAID, ids=["runtime", "python", "shape"])
def test_a_parted_run_tells_memory_from_the_rest(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, said: Exception, kind: type[Exception]
) -> None:
    model = PartedModel(artifacts["fused"])
    stream = model.stream([[IDS]])
    monkeypatch.setattr(model._runtime, "InferenceSession", raising(said))
    with pytest.raises(kind):
        next(iter(model.logits(stream)))


WORDS = [
    (["llama_init_from_model: failed to allocate buffer for kv cache"], ResourceError),
    (["ggml_aligned_malloc: insufficient memory (attempted to allocate 96.00 MB)", "fatal error"], ResourceError),
    (["llama_model_load: error loading model: invalid vector subscript"], InputError),
    ([], InputError),
]


@pytest.mark.parametrize(("logged", "kind"), WORDS, ids=["cache", "tensor", "file", "nothing"])
def test_llama_cpps_log_tells_memory_from_the_rest(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], kind: type[Exception]
) -> None:
    monkeypatch.setattr(interface, "errors", logged)
    error = interface.failure("m.gguf: llama.cpp cannot open it")
    assert type(error) is kind
    assert not logged or logged[0] in str(error)


ENDS = [
    (-9, "", ResourceError, "the system killed its process"),
    (-6, "terminate called after throwing an instance of 'std::bad_alloc'", ResourceError, "bad_alloc"),
    (1, "Traceback\nMemoryError", ResourceError, "MemoryError"),
    (-11, "Segmentation fault", InputError, "status -11"),
]


@pytest.mark.parametrize(("code", "said", "kind", "reason"), ENDS, ids=["killed", "thrown", "raised", "crashed"])
def test_bench_tells_what_its_process_ended_for(
    artifacts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    said: str,
    kind: type[Exception],
    reason: str,
) -> None:
    ended = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(latency.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(kind, match=reason):
        latency._in_child(artifacts["fused"], Workload())
