"""NVFP4 inputs in a TensorRT folder: TensorRT's operator, computed by its definition, gives the folder's logits.

The graph is run by the onnx library's reference implementation, since ONNX Runtime has neither FP4 kernels nor that
operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import MissingRuntimeError, UnsupportedError
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx, qdq, write_graph
from qwen3_export.ship.onnx.target import Files, choose
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.parser import check_graph
from tests.artifact.support import logits, mean_kl, random_ids, round_to_nearest, tiny_with_tokenizer
from tests.conftest import tiny_config, write_checkpoint

SCHEME = QuantScheme(4, "float", group_size=16, scale_dtype="e4m3", activations="dynamic-group")


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's dynamic double quantization, by its definition, in numpy and ml_dtypes."""

    op_domain = "trt"

    def _run(self, x: Any, double: Any, **given: int) -> Any:
        assert given == {"axis": -1, "block_size": 16, "scale_type": onnx.TensorProto.FLOAT8E4M3FN}
        groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
        scales = (np.abs(groups).max(-1) / np.float32(6) / double).clip(max=448).astype(ml_dtypes.float8_e4m3fn)
        wide = scales.astype(np.float32)[..., None] * double
        units = np.divide(groups, wide, out=np.zeros_like(groups), where=wide > 0)
        return units.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scales


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Checkpoint:
    base = tmp_path_factory.mktemp("nvfp4")
    config = tiny_config(hidden_size=128, intermediate_size=192)
    return round_to_nearest(tiny_with_tokenizer(base / "tiny", reference_folder, config), base / "q", ("*", SCHEME))


def with_input_scales(source: Checkpoint, folder: Path, change: Callable[[float], float]) -> Checkpoint:
    """The folder without our manifest, as llm-compressor leaves it, with other numbers above the scales of inputs."""
    tensors = {name: source.read(name) for name in source.files}
    for name in [name for name in tensors if name.endswith("input_global_scale")]:
        tensors[name] = np.array([change(float(tensors[name][0]))], np.float32)
    write_checkpoint(folder, json.loads((source.folder / "config.json").read_text()), tensors)
    return open_checkpoint(folder)


def computed(folder: Path, ids: np.ndarray, kind: Any) -> np.ndarray:
    """The graph's logits of one prompt, in the reference implementation."""
    model = onnx.load(str(folder / "model.onnx"))
    given = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids))),
        "position_ids": np.arange(len(ids))[None],
    }
    feeds = {name: array.astype(np.int64) for name, array in given.items()}
    for item in model.graph.input:
        if item.name not in feeds:
            _, heads, _, width = (axis.dim_value for axis in item.type.tensor_type.shape.dim)
            feeds[item.name] = np.zeros((1, heads, 0, width), kind)
    return ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize]).run(["logits"], feeds)[0][0]


def test_the_graph_computes_the_folders_logits(source: Checkpoint, tmp_path: Path) -> None:
    """In fp32, where no input lands on the other side of a tie; the folder's own are those of compressed-tensors."""
    (tmp_path / "onnx").mkdir()
    target = replace(choose("standard", precision="fp32"), flavor="tensorrt")
    write_graph(source, tmp_path / "onnx", target, Files(), Progress())
    check_graph(tmp_path / "onnx")
    ids = random_ids(40)
    (truth,) = logits(source.folder, [ids])
    assert mean_kl([truth], [computed(tmp_path / "onnx", ids, np.float32)]) < 1e-9


def test_the_plans_graph_rounds_every_linears_inputs_by_its_own_scale(source: Checkpoint, tmp_path: Path) -> None:
    result = export_tensorrt(source, tmp_path / "trt", capabilities=("12.0",), onnx_only=True)
    model = onnx.load(str(tmp_path / "trt" / "model.onnx"))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and (maker := makers.get(node.input[0])) and maker.op_type == "DequantizeLinear":
            quantized, scales = makers[maker.input[0]], makers[maker.input[1]]
            assert quantized.op_type == "TRT_FP4DynamicQuantize"
            assert scales.input[0] == quantized.output[1]
            found[node.name.replace("layer.", "model.layers.")] = float(constants[quantized.input[1]])
            # Four significant bits: the same number in 16 bits.
            assert constants[scales.input[1]] == pytest.approx(constants[quantized.input[1]], rel=2.0**-23)
            assert constants[scales.input[1]].dtype == np.float16
    wanted = {name: source.linear(name).input_scale for name in source.schemes}  # type: ignore[union-attr]
    assert found == pytest.approx(wanted, rel=2.0**-23)
    assert len(set(found.values())) > 2
    for name in source.schemes:
        assert qdq.inexact_number(source.linear(name).input_scale, ir.DataType.FLOAT16) == 0  # type: ignore
    assert all(item["max_rel_error"] < 1.5e-3 for item in result["inexact_tensors"])


def test_what_16_bits_do_to_another_tools_input_scale_is_said(source: Checkpoint, tmp_path: Path) -> None:
    theirs = with_input_scales(source, tmp_path / "theirs", lambda divisor: divisor * 1.03)
    assert {scheme.label for scheme in theirs.schemes.values()} == {"nvfp4-g16-dynamic-group"}
    result = export_tensorrt(theirs, tmp_path / "trt", capabilities=("12.0",), precision="bf16", onnx_only=True)
    errors = {item["name"]: item["max_rel_error"] for item in result["inexact_tensors"]}
    for name in theirs.schemes:
        tensor = theirs.linear(name)
        assert isinstance(tensor, QuantizedTensor)
        rounded = float(np.array(tensor.input_scale).astype(ml_dtypes.bfloat16))
        assert errors[name] >= abs(rounded / tensor.input_scale - 1)  # type: ignore[operator]


def test_an_input_scale_outside_of_fp16_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    theirs = with_input_scales(source, tmp_path / "theirs", lambda _: 2.0**30)
    with pytest.raises(UnsupportedError, match=r"q_proj: .* 9.3e-10, which multiply .* do not fit into fp16") as caught:
        export_tensorrt(theirs, tmp_path / "trt", capabilities=("12.0",), onnx_only=True)
    assert "bf16" in str(caught.value.hint)
    export_tensorrt(theirs, tmp_path / "bf16", capabilities=("12.0",), precision="bf16", onnx_only=True)


def test_other_formats_refuse_nvfp4_inputs_by_name(source: Checkpoint, tmp_path: Path) -> None:
    name = next(iter(source.schemes))
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: export_gguf(source, tmp_path / "m.gguf"), "activations rounded by dynamic-group have no place there"),
        (lambda: export_onnx(source, tmp_path / "ort"), "its 4-bit floats have no exact place there"),
        (lambda: export_onnx(source, tmp_path / "std", "standard"), "runs in no ONNX runtime on a CPU"),
        (lambda: export_tensorrt(source, tmp_path / "old", capabilities=("8.9",)), "--sm 8.9 has no kernels for nvfp4"),
    ]
    for export, reason in refusals:
        with pytest.raises(UnsupportedError, match=reason) as caught:
            export()
        assert "--sm" in reason or name in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_plans_onnx_runs_on_its_gpu_alone(source: Checkpoint, tmp_path: Path) -> None:
    export_tensorrt(source, tmp_path / "trt", capabilities=("12.0",), onnx_only=True)
    with pytest.raises(MissingRuntimeError, match=r"no kernel for it .*TRT_FP4DynamicQuantize") as caught:
        logits(tmp_path / "trt", [random_ids(4)])
    assert "run the plan on its GPU" in caught.value.hint
