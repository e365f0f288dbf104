"""What becomes of TensorRT's and the driver's failures: the error's kind, its reason, and what is held afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from tests.unit.run.fake_cuda import FakeDriver, nothing_is_held
from tests.unit.run.fake_tensorrt import FakeEngine, plan_bytes

IDS = np.random.default_rng(3).integers(0, 320, 40).astype(np.int32)
KERNEL, MEMORY = (
    "Error Code 1: the kernel failed\nat a place",
    "Error Code 2: OutOfMemory (Requested size was 99 bytes.)",
)
FAILURES = [
    (MEMORY, ResourceError, r"OutOfMemory \(Requested size was 99 bytes"),
    (KERNEL, MissingRuntimeError, r"tensorrt-rtx cannot run it \(Error Code 1: the kernel failed\)$"),
]


def test_what_tensorrt_says_is_the_error(device: Callable, folder: Path) -> None:
    """Of each step the first words: the others follow from it. A later step works again."""
    driver, module = device()
    session = open_session(folder)
    first = session.prefill(IDS[:3])
    for said, kind, reason in FAILURES:
        module.made[0].fails = (said, "what follows")
        with pytest.raises(kind, match=reason) as caught:
            session.prefill(IDS[:3])
        assert caught.value.hint
    module.made[0].fails = ()
    np.testing.assert_array_equal(session.prefill(IDS[:3]), first)
    session.close()
    assert nothing_is_held(driver)


def test_a_broken_driver_is_a_missing_device(device: Callable, folder: Path) -> None:
    """After an illegal access the driver refuses every call, those that free memory too."""
    driver, _ = device()
    session = open_session(folder)
    session.prefill(IDS[:3])
    for name, (address, _) in session._buffers.items():
        if name.startswith("present.0"):
            del driver.buffers[address]
    with pytest.raises(MissingRuntimeError, match="an illegal memory access was encountered") as caught:
        session.decode(1)
    assert folder.name in str(caught.value)
    session.close()


def no_context(engine: FakeEngine) -> None:
    engine.create_execution_context = lambda: engine.refuse(MEMORY) or None  # type: ignore[method-assign]


def failing_context(engine: FakeEngine) -> None:
    engine.create_execution_context = lambda: engine.refuse(KERNEL) or None  # type: ignore[method-assign]


def with_kind(name: str, kind: Any) -> Callable[[FakeEngine], None]:
    return lambda engine: setattr(engine.items[name], "kind", kind)


def with_place(name: str) -> Callable[[FakeEngine], None]:
    return lambda engine: setattr(engine.items[name], "place", "HOST")


def with_another(engine: FakeEngine) -> None:
    engine.items["beam"] = engine.items["logits"]


UNFIT = {
    "half logits": (with_kind("logits", tensorrt_rtx.float16), InputError, "logits is HALF OUTPUT in DEVICE"),
    "int32 ids": (with_kind("input_ids", tensorrt_rtx.int32), InputError, "INT64 INPUT in DEVICE memory was expected"),
    "8-bit cache": (with_kind("past_key_values.0.key", tensorrt_rtx.int8), InputError, "INT8 INPUT"),
    "two types": (with_kind("present.1.key", tensorrt_rtx.bfloat16), InputError, "present.1.key is BF16"),
    "shape tensor": (with_place("attention_mask"), InputError, "attention_mask is INT64 INPUT in HOST memory"),
    "one more": (with_another, InputError, "no decoder of ours has the tensor beam"),
    "one less": (lambda engine: engine.items.pop("present.0.value"), InputError, "lacks the tensor present.0.value"),
    "no room": (no_context, ResourceError, "OutOfMemory"),
    "no kernels": (failing_context, MissingRuntimeError, "has no context for profile 0"),
}


@pytest.mark.parametrize(("change", "kind", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_a_plan_that_this_runner_cannot_feed(
    device: Callable, folder: Path, change: Callable[[FakeEngine], None], kind: type[ExportError], reason: str
) -> None:
    driver, module = device()
    module.change = change
    with pytest.raises(kind, match=reason):
        open_session(folder)
    assert nothing_is_held(driver)


def with_plan(folder: Path, output: Path, plan: bytes) -> Path:
    """The folder with another plan."""
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).symlink_to(path)
    (output / "model.plan").unlink()
    (output / "model.plan").write_bytes(plan)
    return output


def test_a_plan_that_is_none(device: Callable, folder: Path, tmp_path: Path) -> None:
    driver, _ = device()
    plan = plan_bytes(b"vtrt", "1.7.1.116", ("8.9", "12.0"), b"damaged")
    with pytest.raises(InputError, match=r"tensorrt-rtx cannot load it \(.*magic tag does not match\)\)$") as caught:
        open_session(with_plan(folder, tmp_path / "none", plan))
    assert caught.type is InputError
    assert nothing_is_held(driver)


@pytest.mark.parametrize("engine", ["rtx", "trt"])
def test_a_plan_that_begins_as_none_is_told_without_its_runtime(engine: str, folder: Path, tmp_path: Path) -> None:
    """Also where its ONNX would run in its place; not where that was asked for."""
    other = with_plan(folder, tmp_path / "none", b"<html>")
    described = json.loads((folder / "engine.json").read_text())
    (other / "engine.json").unlink()
    (other / "engine.json").write_text(json.dumps({**described, "engine": engine}))
    for options in (RuntimeOptions(), RuntimeOptions(device="plan")):
        with pytest.raises(InputError, match=r"model\.plan: the plan is damaged: it begins with b'<htm'"):
            open_session(other, options)
    session = open_session(other, RuntimeOptions(device="cpu", threads=1))
    assert session.runtime == "onnxruntime (the plan's ONNX)"
    session.close()


def test_a_full_gpu_is_a_lack_of_memory(device: Callable, folder: Path) -> None:
    driver, _ = device(FakeDriver(room=1000))
    with pytest.raises(ResourceError, match="GPU's memory is full"):
        open_session(folder)
    assert nothing_is_held(driver)


def test_a_gpu_that_fills_up_later(device: Callable, folder: Path) -> None:
    """The session keeps what it had, and can be closed."""
    driver, _ = device()
    session = open_session(folder, RuntimeOptions(context=8))
    session.prefill(IDS[:8])
    driver.room = sum(map(len, driver.buffers.values())) + 1000
    with pytest.raises(ResourceError, match="GPU's memory is full"):
        session.decode(1)
    driver.room = 1 << 30
    assert np.isfinite(session.prefill(IDS[:40])).all()
    session.close()
    assert nothing_is_held(driver)
