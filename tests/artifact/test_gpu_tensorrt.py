"""Plans and execution providers on a real GPU; nothing of this runs where there is none.

pytest -m gpu tests/artifact/test_gpu_tensorrt.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.cuda import Gpu
from qwen3_export.core.plan_folder import CAPABILITIES
from qwen3_export.core.source import open_source
from qwen3_export.errors import MissingRuntimeError
from qwen3_export.run import devices
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.profiles import Profile

pytestmark = pytest.mark.gpu


def capability() -> str | None:
    """The GPU's compute capability, None without one."""
    try:
        gpu = Gpu()
    except MissingRuntimeError:
        return None
    gpu.close()
    return gpu.capability


GPU = capability()
needs_gpu = pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU")
needs_rtx = pytest.mark.skipif(GPU not in CAPABILITIES, reason="needs an NVIDIA GPU that TensorRT-RTX takes")


def generated(session: object, ids: NDArray, count: int = 16) -> tuple[list[int], NDArray]:
    """Greedy tokens, and the prompt's logits."""
    prompt = session.prefill(ids)  # type: ignore[attr-defined]
    tokens = [int(prompt[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(session.decode(tokens[-1]).argmax()))  # type: ignore[attr-defined]
    session.close()  # type: ignore[attr-defined]
    return tokens, prompt


@needs_rtx
@pytest.mark.parametrize("name", ["original", "gptq-w4a16-g128", "gptq-w4a16-g32"])
def test_a_plan_gives_its_onnx_logits(
    source: Callable[[str], Path], rows: list[NDArray], tmp_path: Path, name: str
) -> None:
    checkpoint = open_source(str(source(name)))
    assert GPU is not None
    export_tensorrt(checkpoint, tmp_path / "trt", capabilities=(GPU,), profile=Profile(64, 512))
    ids = rows[0][:150]
    plan = open_session(tmp_path / "trt", RuntimeOptions(device="plan"))
    assert plan.runtime == "tensorrt-rtx"
    tokens, prompt = generated(plan, ids)
    wanted, truth = generated(open_session(tmp_path / "trt", RuntimeOptions(device="cpu")), ids)
    assert np.abs(prompt - truth).max() < 0.1
    assert (prompt.argmax(-1) == truth.argmax(-1)).mean() > 0.99
    assert tokens[:8] == wanted[:8]


@needs_gpu
def test_a_plan_of_another_capability_is_refused(source: Callable[[str], Path], tmp_path: Path) -> None:
    other = "12.1" if GPU != "12.1" else "12.0"
    export_tensorrt(open_source(str(source("original"))), tmp_path / "trt", capabilities=(other,))
    with pytest.raises(MissingRuntimeError, match=f"compute capability {GPU}, the plan is for {other}"):
        open_session(tmp_path / "trt", RuntimeOptions(device="plan"))


@needs_gpu
@pytest.mark.parametrize("device", ["cuda", "rtx"])
def test_a_provider_gives_the_processors_logits(
    source: Callable[[str], Path], rows: list[NDArray], tmp_path: Path, device: str
) -> None:
    try:
        devices.find_provider(device)
    except MissingRuntimeError as error:
        pytest.skip(str(error))
    options = {"target": "cuda"} if device == "cuda" else {"target": "standard", "precision": "fp16"}
    export_onnx(open_source(str(source("gptq-w4a16-g128"))), tmp_path / "onnx", **options)
    ids = rows[0][:150]
    tokens, prompt = generated(open_session(tmp_path / "onnx", RuntimeOptions(device=device)), ids)
    wanted, truth = generated(open_session(tmp_path / "onnx", RuntimeOptions(device="cpu")), ids)
    assert np.abs(prompt - truth).max() < 0.1
    assert tokens[:8] == wanted[:8]
