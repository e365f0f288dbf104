"""The plan's runner over a fake of TensorRT and of the driver: names, shapes, buffers, profiles and errors.

The fakes compute with ONNX Runtime on the bytes that lie in their buffers, and refuse what the real ones refuse; see
`fake_tensorrt` and `fake_cuda`. What a real GPU does is `tests/artifact/test_gpu_tensorrt.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.errors import ExportError, InputError, MissingRuntimeError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.ort import OrtSession
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.run.tensorrt import PlanSession
from tests.unit.run.fake_cuda import FakeDriver, nothing_is_held
from tests.unit.run.fake_tensorrt import PROFILE, plan_bytes

IDS = np.random.default_rng(3).integers(0, 320, 40).astype(np.int32)


def of_the_onnx(folder: Path, prompt: int, steps: int) -> list[np.ndarray]:
    session = OrtSession(folder, RuntimeOptions(threads=1))
    found = [session.prefill(IDS[:prompt])]
    found += [session.decode(int(token)) for token in IDS[prompt : prompt + steps]]
    session.close()
    return found


@pytest.mark.parametrize("profiles", [1, 2])
@pytest.mark.parametrize("prompt", [1, 7, 16, 33])
def test_prefill_and_decode_give_the_graphs_logits(device: Callable, folder: Path, profiles: int, prompt: int) -> None:
    """33 tokens go in three pieces: a profile takes 16 at once."""
    driver, module = device(profiles=profiles)
    session = open_session(folder)
    assert isinstance(session, PlanSession)
    assert (session.runtime, session.version, session.device) == ("tensorrt-rtx", "1.7.1.116", "cuda (Fake RTX, 8.9)")
    ours = [session.prefill(IDS[:prompt]), *(session.decode(int(token)) for token in IDS[prompt : prompt + 4])]
    for mine, theirs in zip(ours, of_the_onnx(folder, prompt, 4), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
    pieces = [16, 16, 1] if prompt == 33 else [prompt]
    steps = module.made[0].steps
    assert [count for _, count in steps] == [*pieces, 1, 1, 1, 1]
    # The profile that is made for one token takes one token, where there is one.
    assert all(number == (1 if profiles == 2 and count == 1 else 0) for number, count in steps)
    session.close()
    assert nothing_is_held(driver)


def test_a_new_sequence_forgets_the_last(device: Callable, folder: Path) -> None:
    device()
    session = open_session(folder)
    first = session.prefill(IDS[:9])
    session.decode(5)
    np.testing.assert_array_equal(session.prefill(IDS[:9]), first)
    session.close()


def test_caches_stay_on_the_device(device: Callable, folder: Path) -> None:
    """Ids, positions and mask go there, logits come back: nothing of the size of a cache does either."""
    driver, _ = device()
    session = open_session(folder)
    session.prefill(IDS[:12])
    driver.uploads.clear()
    driver.downloads.clear()
    session.decode(1)
    assert sorted(driver.uploads) == [8, 8, 13 * 8]
    assert driver.downloads == [session.vocab_size * 4]
    assert session.device_memory_bytes > 0
    session.close()


def test_past_and_present_change_places_in_buffers_that_stay(device: Callable, folder: Path) -> None:
    driver, _ = device()
    session = open_session(folder)
    session.prefill(IDS[:12])
    session.decode(1)
    buffers, places = set(driver.buffers), []
    for token in range(4):
        session.decode(token)
        places.append({name: at for name, (at, _) in session._buffers.items() if name.startswith(("past", "present"))})
    assert places[0] == places[2] != places[1] == places[3]
    for name in (name for name in places[0] if name.startswith("past")):
        present = name.replace("past_key_values", "present")
        assert (places[0][name], places[0][present]) == (places[1][present], places[1][name])
    # The mask alone has become longer.
    assert len(set(driver.buffers) ^ buffers) == 2
    session.close()


@pytest.mark.parametrize("profiles", [1, 2])
def test_a_cache_grows_with_what_is_in_it(device: Callable, folder: Path, profiles: int) -> None:
    device(profiles=profiles)
    session = open_session(folder, RuntimeOptions(context=8))
    ours = [session.prefill(IDS[:6]), *(session.decode(int(token)) for token in IDS[6:30])]
    for mine, theirs in zip(ours, of_the_onnx(folder, 6, 24), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
    session.close()


def test_a_session_runs_in_any_thread(device: Callable, folder: Path) -> None:
    """A server answers in threads of its own, and the driver's context belongs to a thread."""
    driver, _ = device()
    session, found = open_session(folder), []
    thread = threading.Thread(target=lambda: found.append(session.prefill(IDS[:5])))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], session.prefill(IDS[:5]))
    session.close()
    assert nothing_is_held(driver)


@pytest.mark.parametrize("profiles", [1, 2])
def test_tokens_beyond_the_context_are_refused(device: Callable, folder: Path, profiles: int) -> None:
    """What is accepted runs to its end, with one profile too, whose mask has room for more."""
    device(profiles=profiles)
    session = open_session(folder)
    assert session.context == PROFILE.max_context + 1
    with pytest.raises(InputError, match="98 tokens, between 1 and 97"):
        session.prefill(np.zeros(98, np.int32))
    session.prefill(np.zeros(96, np.int32))
    session.decode(0)
    with pytest.raises(InputError, match="98 tokens"):
        session.decode(0)
    with pytest.raises(InputError, match="vocabulary"):
        session.prefill(np.array([320], np.int32))
    session.close()


NOT_HERE: list[tuple[dict[str, Any], str]] = [
    ({"driver": FakeDriver("9.0", "H200")}, "H200 has compute capability 9.0, the plan is for 8.9, 12.0"),
    (
        {"driver": FakeDriver(devices=0)},
        "no usable NVIDIA GPU is here (cuDeviceGet: no CUDA-capable device is detected)",
    ),
    ({"version": "1.6.0.50"}, "tensorrt-rtx 1.6.0.50 is installed, the plan is one of 1.7.1.116"),
]


@pytest.mark.parametrize(("given", "reason"), NOT_HERE, ids=["device", "none", "version"])
def test_a_plan_of_another_device_or_version(device: Callable, folder: Path, given: dict, reason: str) -> None:
    """Asked for by name it is refused; else its ONNX runs, and says why."""
    device(**given)
    with pytest.raises(MissingRuntimeError) as caught:
        open_session(folder, RuntimeOptions(device="plan"))
    assert str(caught.value) == reason
    assert caught.value.hint
    session = open_session(folder)
    assert session.runtime == "onnxruntime (the plan's ONNX)"
    assert session.plan_not_run == reason
    session.close()


def test_a_plan_that_trtexec_built_runs_in_whatever_version_is_installed(
    device: Callable, folder: Path, tmp_path: Path
) -> None:
    """Its folder, of `--onnx-only`, names neither version nor capabilities."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("engine.json", "model.plan"):
        (tmp_path / name).unlink()
    (tmp_path / "model.plan").write_bytes(plan_bytes(b"ftrt", "10.13.0.35"))
    described = json.loads((folder / "engine.json").read_text())
    unknown = {**described, "engine": "trt", "version": None, "compute_capabilities": []}
    (tmp_path / "engine.json").write_text(json.dumps(unknown))
    device(FakeDriver(capability="9.0"), version="10.13.0.35")
    session = open_session(tmp_path, RuntimeOptions(device="plan"))
    assert isinstance(session, PlanSession)
    assert (session.runtime, session.version) == ("tensorrt", "10.13.0.35")
    session.close()


def test_without_a_driver_the_onnx_runs_and_says_so(folder: Path) -> None:
    with pytest.raises(MissingRuntimeError, match=r"no NVIDIA driver is here \(libcuda.so.1\)|no usable NVIDIA GPU"):
        open_session(folder, RuntimeOptions(device="plan"))
    session = open_session(folder, RuntimeOptions(threads=1))
    assert (session.runtime, session.device) == ("onnxruntime (the plan's ONNX)", "cpu")
    assert "NVIDIA" in session.plan_not_run
    session.close()


WRONG: list[tuple[RuntimeOptions, type[ExportError], str]] = [
    (RuntimeOptions(device="tpu"), InputError, "--device tpu: one of cpu, cuda, rtx, plan"),
    (RuntimeOptions(device="plan", exact=True), InputError, "--exact"),
]


@pytest.mark.parametrize(("options", "kind", "reason"), WRONG, ids=["unknown", "exact"])
def test_devices_that_cannot_be(folder: Path, options: RuntimeOptions, kind: type[ExportError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        open_session(folder, options)


def test_only_a_folder_with_a_plan_runs_one(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "model.plan":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError, match="no plan in it"):
        open_session(tmp_path, RuntimeOptions(device="plan"))
    with pytest.raises(InputError, match="--device plan is for ONNX and TensorRT folders"):
        open_session(folder.parent / "tiny", RuntimeOptions(device="plan"))
