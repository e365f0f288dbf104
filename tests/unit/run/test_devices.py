"""`--device cuda|rtx` of the ONNX runner: what is refused, and that caches stay where the device is.

No GPU is here: the device's way through ONNX Runtime is walked with providers that every installation has, the
processor's own and Azure's, which has kernels for nothing of a decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError
from qwen3_export.run import devices
from qwen3_export.run.artifact import check_runnable, open_session
from qwen3_export.run.batch import batch_of
from qwen3_export.run.devices import Provider
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.onnx import export_onnx
from tests.conftest import tiny_config, write_checkpoint

IDS = np.random.default_rng(5).integers(0, 320, 300).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("devices")
    checkpoint = open_checkpoint(write_checkpoint(base / "tiny", tiny_config(max_position_embeddings=512)))
    for flavor in ("ort", "standard"):
        export_onnx(checkpoint, base / flavor, flavor=flavor)
    return {flavor: base / flavor for flavor in ("ort", "standard")}


@pytest.mark.parametrize(
    ("device", "provider", "remedy"),
    [
        ("cuda", "CUDAExecutionProvider", "onnxruntime-gpu"),
        ("rtx", "NvTensorRTRTXExecutionProvider", "nv-tensorrt-rtx"),
    ],
)
def test_a_provider_that_is_not_installed(folders: dict, device: str, provider: str, remedy: str) -> None:
    options, reason = RuntimeOptions(device=device), f"--device {device} needs {provider}.*CPUExecutionProvider"
    for ask in (lambda: check_runnable(folders["ort"], device), lambda: open_session(folders["ort"], options)):
        with pytest.raises(MissingRuntimeError, match=reason) as caught:
            ask()
        assert remedy in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_a_device_gives_the_processors_logits(folders: dict, monkeypatch: pytest.MonkeyPatch, flavor: str) -> None:
    """The cache is one of ONNX Runtime's values, written in place or moved, and grows past its first 256 positions."""
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("CPUExecutionProvider", "cpu", ""))
    found = []
    for device in (None, "cuda"):
        session = open_session(folders[flavor], RuntimeOptions(threads=1, device=device))
        assert session.device == (device or "cpu")
        for _ in range(2):
            logits = [
                session.prefill(IDS[:250]),
                *(session.decode(int(token)) for token in IDS[250:260]),
            ]
        found.append(logits)
        assert device is None or all(isinstance(v, onnxruntime.OrtValue) for v in session._cache.values())
        assert batch_of(session, 4).slots == (4 if flavor == "ort" and device is None else 1)
        session.close()
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_cudas_libraries_are_loaded_without_a_word(
    folders: dict, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stdout is for results, and a library that is missing is named by one error."""
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("CPUExecutionProvider", "cpu", ""))
    called = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: called.append(print("Failed to load libcublas.so")))
    open_session(folders["ort"], RuntimeOptions(threads=1, device="cuda")).close()
    assert called
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_provider_without_its_libraries(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the processor's provider; we do not."""
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("CPUExecutionProvider", "cpu", ""))
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(MissingRuntimeError, match="finds no GPU that it can use, or lacks CUDA's libraries") as caught:
        open_session(folders["ort"], RuntimeOptions(device="cuda"))
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.hint


def test_products_on_the_processor_are_refused(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("AzureExecutionProvider", "cpu", ""))
    with pytest.raises(MissingRuntimeError, match=r"no kernels for .*MatMul.*would run on the processor"):
        open_session(folders["ort"], RuntimeOptions(device="cuda"))


def test_an_onnx_runtime_that_does_not_tell(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("CPUExecutionProvider", "cpu", "newer"))
    owner = next(c for c in onnxruntime.InferenceSession.__mro__ if "get_provider_graph_assignment_info" in vars(c))
    monkeypatch.delattr(owner, "get_provider_graph_assignment_info")
    with pytest.raises(MissingRuntimeError, match=r"1\.24 or later"):
        open_session(folders["ort"], RuntimeOptions(device="cuda"))


def plugin(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    module = SimpleNamespace(get_library_path=lambda: path)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", module)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())


def test_a_plugin_that_cannot_be_loaded(folders: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin(monkeypatch, str(tmp_path / "none.so"))
    with pytest.raises(MissingRuntimeError, match="NvTensorRTRTXExecutionProvider cannot be loaded"):
        open_session(folders["standard"], RuntimeOptions(device="rtx"))


def test_a_plugin_that_is_incomplete(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "")

    def missing() -> str:
        raise FileNotFoundError("libonnxruntime_providers_nv_tensorrt_rtx.so")

    monkeypatch.setattr(sys.modules["onnxruntime_ep_nv_tensorrt_rtx"], "get_library_path", missing)
    with pytest.raises(MissingRuntimeError, match=r"cannot be loaded \(libonnxruntime_providers_nv_tensorrt_rtx"):
        open_session(folders["standard"], RuntimeOptions(device="rtx"))


FAILED: list[tuple[str, type[ExportError]]] = [
    ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", MissingRuntimeError),
    ("CUDA failure 2: out of memory ; GPU=0", ResourceError),
    ("Non-zero status code returned while running Add node: shapes differ", InputError),
]


@pytest.mark.filterwarnings("ignore:Duplicate provider")
@pytest.mark.parametrize(("said", "kind"), FAILED, ids=["driver", "memory", "graph"])
def test_a_device_that_fails(
    folders: dict, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[ExportError]
) -> None:
    monkeypatch.setitem(devices.PROVIDERS, "cuda", Provider("CPUExecutionProvider", "cpu", ""))
    session = open_session(folders["ort"], RuntimeOptions(threads=1, device="cuda"))

    def fail(_: object) -> None:
        raise RuntimeError(said)

    session._session = SimpleNamespace(run_with_iobinding=fail)
    with pytest.raises(kind, match=said.split(":")[0]):
        session.prefill(IDS[:4])


def test_a_plugin_without_a_gpu(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "")
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
    with pytest.raises(MissingRuntimeError, match="finds no GPU"):
        open_session(folders["standard"], RuntimeOptions(device="rtx"))


@pytest.mark.parametrize("device", ["cuda", "rtx", "plan"])
def test_other_artifacts_run_on_the_processor(make_checkpoint: Callable, device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device} is for ONNX and TensorRT folders"):
        check_runnable(make_checkpoint(), device)
