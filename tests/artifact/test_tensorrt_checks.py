"""What must never pass in silence on the way to a plan: dropped attributes and inputs, expanded or doubled weights.

Also classic TensorRT's way through the builder, with TensorRT-RTX under its name.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import tensorrt_rtx

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.cuda import Gpu
from qwen3_export.core.progress import Progress
from qwen3_export.core.resources import resource
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError, MissingRuntimeError, UnsupportedError
from qwen3_export.run.plan_engine import PlanEngine
from qwen3_export.run.plan_files import read_plan
from qwen3_export.ship import tensorrt
from qwen3_export.ship.tensorrt import export_tensorrt, plan_file
from qwen3_export.ship.tensorrt.parser import check_graph
from qwen3_export.ship.tensorrt.plan_file import check_weights
from qwen3_export.ship.tensorrt.profiles import Profile
from qwen3_export.ship.triton import export_triton
from tests.artifact.plans import onnx_weight_bytes, refused
from tests.artifact.support import round_to_nearest
from tests.conftest import tiny_config, write_checkpoint

# What a second profile may add to a model this small.
LAID_OUT_ANEW = 1.8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder, 4 bits."""
    base = tmp_path_factory.mktemp("checks")
    source = write_checkpoint(base / "tiny", tiny_config())
    checkpoint = round_to_nearest(source, base / "quantized", ("*", QuantScheme(4, group_size=32)))
    export_tensorrt(checkpoint, base / "trt", capabilities=("8.9",), profile=Profile(16, 32))
    return base / "trt"


def changed(folder: Path, output: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a folder whose graph is changed."""
    shutil.copytree(folder, output)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model)
    (output / "model.onnx").write_bytes(model.SerializeToString())
    return output


def with_attribute(operator: str, **values: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == operator:
                node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())

    return change


def with_lengths(model: onnx.ModelProto) -> None:
    """Of Attention the seventh input, which says how much of a cache is filled."""
    model.opset_import[0].version = 24
    lengths = onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ["batch_size"])
    model.graph.input.append(lengths)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input.extend(["", "", "lengths"])


DROPPED = {
    "a number's limits": (with_attribute("Cast", saturate=0), "drops Cast's saturate"),
    "an output": (with_attribute("Attention", qk_matmul_output_mode=2), "drops Attention's qk_matmul_output_mode"),
    "a made-up attribute": (with_attribute("DequantizeLinear", rounding="up"), "drops DequantizeLinear's rounding"),
    "a length": (with_lengths, "reads 4 inputs of Attention, it has 7"),
}


@pytest.mark.parametrize(("change", "reason"), DROPPED.values(), ids=DROPPED.keys())
def test_what_the_parser_drops_in_silence_is_an_error(
    made: Path, tmp_path: Path, change: Callable, reason: str
) -> None:
    check_graph(made)
    other = changed(made, tmp_path / "other", change)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network()
    assert tensorrt_rtx.OnnxParser(network, logger).parse_from_file(str(other / "model.onnx")), "it says nothing"
    with pytest.raises(UnsupportedError, match=reason):
        check_graph(other)


def test_an_input_that_the_compiler_does_not_use_is_an_error(make_checkpoint: Callable, tmp_path: Path) -> None:
    checkpoint, profile = open_checkpoint(make_checkpoint()), Profile(16, 32)
    export_tensorrt(checkpoint, tmp_path / "trt", profile=profile, onnx_only=True)
    other = changed(tmp_path / "trt", tmp_path / "other", with_lengths)
    shapes = [{**one, "lengths": ((1,), (1,), (1,))} for one in tensorrt.profiles_of(checkpoint, profile)]
    with pytest.raises(UnsupportedError, match="would be ignored: Unused Input: lengths"):
        plan_file.build_plan(other, "rtx", ("8.9",), shapes, Progress())


def test_8_bit_groups_of_one_input_are_refused_and_others_are_not(make_checkpoint: Callable, tmp_path: Path) -> None:
    source, eight = make_checkpoint(), QuantScheme(8, group_size=32)
    every = round_to_nearest(source, tmp_path / "every", ("*", eight))
    refused(every, tmp_path, UnsupportedError, r"q_proj and .*k_proj are 8-bit integers in groups.* stores these twice")
    rules = (("*.o_proj", eight), ("*.down_proj", eight), ("*", QuantScheme(4, group_size=32)))
    some = round_to_nearest(source, tmp_path / "some", *rules)
    export_tensorrt(some, tmp_path / "trt", capabilities=("8.9",), profile=Profile(16, 32))


def test_a_plan_that_expanded_its_codes_is_an_error(made: Path, tmp_path: Path) -> None:
    """A header that tells of twice the ONNX's bytes."""
    check_weights(made, LAID_OUT_ANEW)
    plan = bytearray((made / "model.plan").read_bytes())
    plan[56:64] = struct.pack("<Q", 2 * (made / "model.onnx.data").stat().st_size + 8192)
    (tmp_path / "model.plan").write_bytes(plan)
    (tmp_path / "model.onnx.data").symlink_to(made / "model.onnx.data")
    with pytest.raises(UnsupportedError, match=r"2\.00 times its ONNX's bytes of weights"):
        check_weights(tmp_path, LAID_OUT_ANEW)


def test_classic_tensorrt_is_asked_for_the_same_plan(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX under classic TensorRT's name, whose Python API is the same, and the GPU of a device."""
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plan_file, "Gpu", lambda: SimpleNamespace(capability="8.7", close=lambda: None))
    checkpoint = open_checkpoint(make_checkpoint())
    result = export_tensorrt(checkpoint, tmp_path / "trt", engine="trt", profile=Profile(16, 32))
    described = json.loads((tmp_path / "trt" / "engine.json").read_text())
    assert (described["engine"], described["compute_capabilities"]) == ("trt", ["8.7"])
    assert described["version"] == tensorrt_rtx.__version__
    assert (tmp_path / "trt" / "model.plan").stat().st_size > onnx_weight_bytes(tmp_path / "trt")
    assert result["build"]["profiles"] == 1


PLANS: dict[str, tuple[Callable[[bytes], bytes], type[Exception], str]] = {
    "whole": (lambda plan: plan, MissingRuntimeError, "CUDA driver version is insufficient"),
    "another magic": (lambda plan: b"none" + plan[4:], InputError, "magicTag"),
    "half": (lambda plan: plan[: len(plan) // 2], InputError, "header.size"),
    "a few bytes": (lambda plan: plan[:40], InputError, "bufferSize"),
    "empty": (lambda plan: b"", InputError, "empty memory buffer"),
}


@pytest.mark.parametrize(("change", "kind", "reason"), PLANS.values(), ids=PLANS.keys())
def test_the_library_itself_tells_a_damaged_plan_from_a_missing_driver(
    made: Path, tmp_path: Path, change: Callable, kind: type[Exception], reason: str
) -> None:
    """TensorRT-RTX reads a plan as far as it can without a GPU."""
    try:
        Gpu().close()
        pytest.skip("a GPU is here")
    except MissingRuntimeError:
        pass
    shutil.copyfile(made / "engine.json", tmp_path / "engine.json")
    (tmp_path / "model.plan").write_bytes(change((made / "model.plan").read_bytes()))
    with pytest.raises(kind, match=reason) as caught:
        PlanEngine(tensorrt_rtx, read_plan(tmp_path))
    assert caught.type is kind


def test_a_plan_whose_version_is_unknown_is_served_by_whatever_is_installed(
    make_checkpoint: Callable, tmp_path: Path
) -> None:
    """As after `--onnx-only`, where the plan is built on another machine."""
    export_tensorrt(open_checkpoint(make_checkpoint()), tmp_path / "trt", engine="trt", onnx_only=True)
    (tmp_path / "trt" / "model.plan").write_bytes(b"ftrt" + bytes(60))
    shutil.copyfile(resource("calibration") / "reference-model" / "tokenizer.json", tmp_path / "trt" / "tokenizer.json")
    needed = export_triton(tmp_path / "trt", tmp_path / "repository")["requirements"]
    assert needed.split()[-1] == "tensorrt"
    assert "None" not in (tmp_path / "repository" / "README.md").read_text()
