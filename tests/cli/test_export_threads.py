"""`--threads` of an export without a recipe: what it limits, and where there is nothing to limit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tests.cli.helpers import call, refused


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads of every session of ONNX Runtime."""
    found = set[int]()
    opened = onnxruntime.InferenceSession

    def recorded(graph: Any, settings: Any, **more: Any) -> Any:
        found.add(settings.intra_op_num_threads)
        return opened(graph, settings, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    return found


@pytest.mark.parametrize("options", [(), ("--kv-cache", "int8")])
def test_measuring_of_an_onnx_export_takes_the_threads_that_are_asked_for(
    made: dict[str, Path], asked: set[int], tmp_path: Path, options: tuple[str, ...]
) -> None:
    found = {}
    for threads in (1, 3):
        output = tmp_path / "out"
        result = call("onnx", made["quantized"], "--output", output, *options, "--threads", threads, "--json").json
        # Where two sessions run beside each other, each takes half of the threads.
        assert asked == {1} if threads == 1 else asked <= {1, 3}
        assert threads in asked or not options
        found[threads] = [result[key] for key in result if key.startswith(("added_kl", "kv_cache"))]
        asked.clear()
        shutil.rmtree(output)
    assert found[1]
    assert found[1] == found[3]


def test_a_plan_is_built_by_one_thread(made: dict[str, Path], tmp_path: Path) -> None:
    """TensorRT's builder takes one, so there is nothing that the option could limit."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt.Builder(trt.Logger(trt.Logger.ERROR)).max_threads == 1
    outcome = call("tensorrt", made["quantized"], "--output", tmp_path / "out", "--threads", "2")
    refused(outcome, 2, "--threads: building a plan takes one thread, and there is no --recipe")
