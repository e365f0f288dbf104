"""Shapes and precisions of ONNX folders: small random models of every kind that Qwen3 comes in, against our torch
forward pass; fp16 and bf16, whose losses the result must name; and what is refused, leaving nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError, MissingRuntimeError, UnsupportedError
from qwen3_export.run.artifact import open_session
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import (
    SAME,
    TINY,
    OnnxWeights,
    largest_difference,
    load_graph,
    logits,
    random_ids,
    round_to_nearest,
)
from tests.conftest import random_tensors, tiny_config

BITS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("changes", TINY.values(), ids=TINY.keys())
def test_small_models(make_checkpoint: Callable, tmp_path: Path, changes: dict, flavor: str) -> None:
    folder, ids = make_checkpoint(tiny_config(**changes)), [random_ids(100)]
    export_onnx(open_checkpoint(folder), tmp_path / "onnx", flavor)
    assert largest_difference(logits(tmp_path / "onnx", ids), logits(folder, ids)) < SAME


def test_yarn_and_plain_rope_differ(make_checkpoint: Callable, tmp_path: Path) -> None:
    """Otherwise the YaRN rows above would prove nothing."""
    ids, found = [random_ids(100)], []
    for name in ("yarn", "yarn, attention_factor 1.25", "tied, 4 heads of 32 on 64"):
        folder = make_checkpoint(tiny_config(**TINY[name]), name=name)
        found.append(logits(folder, ids))
    assert largest_difference(found[0], found[1]) > 0.1
    assert largest_difference(found[0], found[2]) > 0.1


def test_untied_head_is_a_weight_of_its_own(make_checkpoint: Callable, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tiny_config(tie_word_embeddings=False)))
    export_onnx(checkpoint, tmp_path / "onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in OnnxWeights(tmp_path / "onnx").model.graph.initializer}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(tensors[name], checkpoint.read(name))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=["F16", "F32", "BF16"])
@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_fp32_export_is_exact_whatever_the_source_holds(
    make_checkpoint: Callable, tmp_path: Path, dtype: type, flavor: str
) -> None:
    tensors = random_tensors(parse_config(tiny_config(), "test"), dtype=dtype)
    folder, ids = make_checkpoint(tensors=tensors), [random_ids(40)]
    result = export_onnx(open_checkpoint(folder), tmp_path / "onnx", flavor)
    assert (result["exact"], result["inexact_tensors"]) == (True, [])
    assert largest_difference(logits(tmp_path / "onnx", ids), logits(folder, ids)) < SAME


def wanted_losses(checkpoint: Checkpoint, dtype: type) -> dict[str, float]:
    """`{tensor: largest change / largest value}` of every source tensor that a type cannot hold."""
    losses = {}
    for name in checkpoint.files:
        array = checkpoint.read(name)
        if array.dtype.kind in "iu":
            continue
        values = array.astype(np.float64)
        change = np.abs(array.astype(dtype).astype(np.float64) - values).max()
        if change:
            losses[name] = change / np.abs(values).max()
    return losses


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("name", ["original", "gptq-w4a16-g128", "gptq-w4a16-g32-asym"])
def test_fp16_runs_and_names_every_loss(
    onnx_folder: Callable, torch_logits: Callable, rows: list[NDArray], name: str, flavor: str
) -> None:
    exported = onnx_folder(name, flavor=flavor, precision="fp16")
    wanted = wanted_losses(exported.source, np.float16)
    assert wanted, "the reference model has values below fp16's normal range"
    assert exported.result["exact"] is False
    found = {item["name"]: item["max_rel_error"] for item in exported.result["inexact_tensors"]}
    assert found.keys() == wanted.keys()
    assert all(wanted[tensor] * 0.99 <= error < 1e-6 for tensor, error in found.items())
    ours, truth = logits(exported.path, rows, exact=True), torch_logits(name)
    assert largest_difference(ours, truth) < 0.05
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, truth, strict=True)]
    assert np.concatenate(same).mean() > 0.99
    assert {t.data_type for t in load_graph(exported.path).graph.initializer}.isdisjoint({onnx.TensorProto.BFLOAT16})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_losses_of_an_fp32_source(make_checkpoint: Callable, tmp_path: Path, precision: str) -> None:
    tensors = random_tensors(parse_config(tiny_config(), "test"), dtype=np.float32)
    checkpoint = open_checkpoint(make_checkpoint(tensors=tensors))
    result = export_onnx(checkpoint, tmp_path / "onnx", precision=precision)
    found = {item["name"]: item["max_rel_error"] for item in result["inexact_tensors"]}
    assert found == pytest.approx(wanted_losses(checkpoint, BITS[precision]), rel=1e-4)
    assert len(found) == len(tensors)


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("name", ["original", "gptq-w4a16-g128"])
def test_bf16_is_exact_and_needs_another_device(onnx_folder: Callable, name: str, flavor: str) -> None:
    exported = onnx_folder(name, flavor=flavor, precision="bf16")
    assert (exported.result["exact"], exported.result["inexact_tensors"]) == (True, [])
    graph = load_graph(exported.path).graph
    assert graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    with pytest.raises(MissingRuntimeError, match="ONNX Runtime") as caught:
        open_session(exported.path)
    assert caught.value.hint


def test_standard_bf16_passes_the_checker(onnx_folder: Callable) -> None:
    folder = onnx_folder("gptq-w4a16-g128", flavor="standard", precision="bf16").path
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)


def test_a_target_sets_what_its_device_wants(make_checkpoint: Callable, tmp_path: Path) -> None:
    scheme = QuantScheme(4, group_size=32)
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", ("*", scheme))
    half, float32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    wanted = {
        "cpu": (float32, 4, [], "ort"),
        "cuda": (half, 0, [{"cuda": {}}], "ort"),
        "standard": (float32, 0, [], "standard"),
    }
    for target, (activations, level, providers, flavor) in wanted.items():
        result, folder = export_onnx(checkpoint, tmp_path / target, target=target), tmp_path / target
        assert load_graph(folder).graph.input[3].type.tensor_type.elem_type == activations
        assert result["accuracy_level"] == level
        manifest = json.loads((folder / "qwen3-export.json").read_text())
        assert (manifest["target"], manifest["flavor"]) == (target, flavor)
        assert (folder / "config.json").is_file()
        if flavor == "ort":
            decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
            assert decoder["session_options"]["provider_options"] == providers


def test_overflow_is_refused(make_checkpoint: Callable, tmp_path: Path) -> None:
    tensors = random_tensors(parse_config(tiny_config(), "test"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    checkpoint = open_checkpoint(make_checkpoint(tensors=tensors))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj"):
        export_onnx(checkpoint, tmp_path / "out" / "onnx", precision="fp16")
    assert not list((tmp_path / "out").glob("*"))
    assert export_onnx(checkpoint, tmp_path / "bf16", precision="bf16")["exact"]


REFUSED = [
    ("ort", QuantScheme(4, group_size=48), "48"),
    ("ort", QuantScheme(4, group_size=8), "8"),
    ("standard", QuantScheme(2, group_size=32), "2-bit"),
]


@pytest.mark.parametrize(("flavor", "scheme", "reason"), REFUSED, ids=lambda value: getattr(value, "label", None))
def test_schemes_that_do_not_fit(
    make_checkpoint: Callable, tmp_path: Path, flavor: str, scheme: QuantScheme, reason: str
) -> None:
    config = tiny_config(hidden_size=96, num_attention_heads=3, num_key_value_heads=1)
    checkpoint = round_to_nearest(make_checkpoint(config), tmp_path / "quantized", ("*", scheme))
    with pytest.raises(UnsupportedError, match=reason) as caught:
        export_onnx(checkpoint, tmp_path / "out" / "onnx", flavor)
    assert "self_attn.q_proj" in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_group_of_512_is_refused(make_checkpoint: Callable, tmp_path: Path) -> None:
    """ONNX Runtime has no MatMulNBits above 256."""
    config = tiny_config(hidden_size=512, intermediate_size=512, head_dim=128)
    checkpoint = round_to_nearest(
        make_checkpoint(config), tmp_path / "quantized", ("*", QuantScheme(4, group_size=512))
    )
    with pytest.raises(UnsupportedError, match="512"):
        export_onnx(checkpoint, tmp_path / "out" / "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"flavor": "tflite"}, {"precision": "fp8"}])
def test_unknown_options(make_checkpoint: Callable, tmp_path: Path, options: dict[str, str]) -> None:
    (value,) = options.values()
    with pytest.raises(InputError, match=value):
        export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
