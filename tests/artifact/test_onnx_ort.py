"""ONNX folders of flavor `ort`: numbers read back with the onnx library equal the solver's, and the logits of
ONNX Runtime equal those of our torch forward pass on the same codes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.ort_folders import EVERY, QUANTIZED, check_codes
from tests.artifact.support import (
    SAME,
    THREADS,
    Exported,
    OnnxFolder,
    OnnxWeights,
    graph_name,
    largest_difference,
    load_graph,
    logits,
    random_ids,
    round_to_nearest,
)
from tests.conftest import tiny_config


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_and_scale_is_the_solvers(onnx_folder: OnnxFolder, name: str) -> None:
    check_codes(onnx_folder(name))


def test_every_plain_matrix_is_the_sources(onnx_folder: OnnxFolder) -> None:
    exported = onnx_folder("original")
    weights = OnnxWeights(exported.path)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in weights.model.graph.initializer}
    for module in exported.linears:
        stored = tensors[f"{graph_name(module)}.weight"]
        np.testing.assert_array_equal(stored, exported.source.read(f"{module}.weight"), module)
    embedding = exported.source.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_torch_at_level_0(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray], name: str
) -> None:
    exported = onnx_folder(name, accuracy_level=0)
    assert largest_difference(logits(exported.path, rows), torch_logits(name)) < SAME


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_config_json_is_that_of_an_unquantized_model(onnx_folder: OnnxFolder, flavor: str) -> None:
    for name in ("original", "gptq-w4a16-g128"):
        exported = onnx_folder(name, flavor=flavor)
        config = json.loads((exported.path / "config.json").read_text())
        assert "quantization_config" not in config
        source = {k: v for k, v in exported.source.raw_config.items() if k != "quantization_config"}
        assert config == source


def test_data_in_several_files(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray], tmp_path: Path
) -> None:
    exported, folder = onnx_folder("gptq-w4a16-g128", accuracy_level=0), tmp_path / "onnx"
    result = export_onnx(exported.source, folder, accuracy_level=0, max_shard_size=2_500_000)
    sizes = {path.name: path.stat().st_size for path in folder.glob("model.onnx.data*")}
    assert set(sizes) == {"model.onnx.data", "model.onnx.data_1", "model.onnx.data_2"}
    # The embedding alone is larger than a file may be; it has one of its own.
    assert sorted(sizes.values())[-2] <= 2_500_000 < max(sizes.values())
    assert result["bits_per_weight"] == pytest.approx(exported.result["bits_per_weight"], rel=0.01)
    for item in result["files"]:
        assert item["sha256"] == hashlib.sha256((folder / item["path"]).read_bytes()).hexdigest()
    assert largest_difference(logits(folder, rows), torch_logits("gptq-w4a16-g128")) < SAME


@pytest.mark.parametrize("name", ["original", "gptq-w4a16-g128", "gptq-w4a16-g32-asym"])
def test_decoding_token_by_token_equals_one_prefill(onnx_folder: OnnxFolder, rows: list[NDArray], name: str) -> None:
    session = open_session(onnx_folder(name, accuracy_level=0).path, RuntimeOptions(threads=THREADS))
    ids = rows[0][:48]
    whole = session.prefill(ids)
    pieces = [session.prefill(ids[:20]), *(session.decode(int(token))[None] for token in ids[20:])]
    assert np.abs(np.concatenate(pieces) - whole).max() < SAME
    session.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_decoding_while_the_cache_grows(
    onnx_folder: OnnxFolder, rows: list[NDArray], reference_folder: Path, flavor: str, precision: str
) -> None:
    """The session's buffers double when they are full: a prompt and its continuation cross 256 and 512 positions."""
    folder = onnx_folder("original", flavor=flavor, precision=precision).path
    session, ids = open_session(folder, RuntimeOptions(threads=THREADS)), np.concatenate(rows)[:516]
    tolerance = 2 * SAME if precision == "fp32" else 0.05
    (truth,) = logits(reference_folder, [ids])
    for begin, end in ((250, 262), (508, 516), (3, 8)):
        pieces = [session.prefill(ids[:begin]), *(session.decode(int(token))[None] for token in ids[begin:end])]
        assert np.abs(np.concatenate(pieces) - truth[:end]).max() < tolerance
    session.close()


def test_a_new_prefill_forgets_the_last_sequence(onnx_folder: OnnxFolder, rows: list[NDArray]) -> None:
    session = open_session(onnx_folder("gptq-w4a16-g128").path, RuntimeOptions(threads=1))
    fresh = session.prefill(rows[0])
    session.prefill(rows[1])
    session.decode(5)
    np.testing.assert_array_equal(session.prefill(rows[0]), fresh)
    session.close()


def test_operators(onnx_folder: OnnxFolder) -> None:
    exported = onnx_folder("gptq-w4a16-g128")
    layers = exported.source.config.num_layers
    counts = Counter(node.op_type for node in load_graph(exported.path).graph.node)
    assert counts["MatMulNBits"] == 4 * layers, "q, k and v are one product, gate and up another"
    assert counts["Split"] == 2 * layers
    assert counts["GroupQueryAttention"] == layers
    assert counts["RotaryEmbedding"] == 2 * layers
    assert counts["MatMul"] == 0
    assert counts["FusedMatMul"] == 1, "the head"
    plain = Counter(node.op_type for node in load_graph(onnx_folder("original").path).graph.node)
    assert (plain["FusedMatMul"], plain["MatMul"], plain["MatMulNBits"]) == (7 * layers + 1, 0, 0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_second_copy_of_a_quantized_matrix(onnx_folder: OnnxFolder, name: str) -> None:
    exported = onnx_folder(name)
    shapes = {sides for shape in exported.linears.values() for sides in (shape, shape[::-1])}
    stored = [
        tuple(t.dims) for t in load_graph(exported.path).graph.initializer if t.data_type != onnx.TensorProto.UINT8
    ]
    assert not shapes & set(stored)


def wanted_bytes(exported: Exported) -> int:
    """What must be stored: codes, fp32 scales, zeros; the 16-bit embedding; fp32 norms; no table of positions."""
    config, total = exported.source.config, 2 * exported.source.config.vocab_size * exported.source.config.hidden_size
    for module, (rows, columns) in exported.linears.items():
        scheme = exported.source.schemes[module]
        groups = columns // scheme.group_size
        total += rows * columns * scheme.num_bits // 8 + 4 * rows * groups
        total += 0 if scheme.symmetric else rows * math.ceil(groups * scheme.num_bits / 8)
    norms = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    return total + 4 * norms


@pytest.mark.parametrize("name", QUANTIZED)
def test_data_file_holds_the_numbers_and_little_else(onnx_folder: OnnxFolder, name: str) -> None:
    exported = onnx_folder(name)
    wanted, tensors = wanted_bytes(exported), len(load_graph(exported.path).graph.initializer)
    size = (exported.path / "model.onnx.data").stat().st_size
    assert wanted <= size <= wanted + 4096 * tensors
    assert (exported.path / "model.onnx").stat().st_size < 100_000
    assert exported.result["bits_per_weight"] == pytest.approx(8 * size / exported.source.config.num_parameters)


def test_weights_are_external_and_the_tied_head_is_stored_once(onnx_folder: OnnxFolder) -> None:
    exported = onnx_folder("gptq-w4a16-g128")
    graph, config = load_graph(exported.path).graph, exported.source.config
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(len(t.raw_data) for t in inside) < 1000
    tables = [t.name for t in graph.initializer if tuple(t.dims) == (config.vocab_size, config.hidden_size)]
    assert len(tables) == 1
    readers = Counter(node.op_type for node in graph.node if tables[0] in node.input)
    assert readers == {"Gather": 1, "Cast": 1}, "the head multiplies by the same table, cast to fp32"


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_inputs_and_outputs_are_those_of_the_contract(onnx_folder: OnnxFolder, flavor: str) -> None:
    exported = onnx_folder("gptq-w4a16-g128", flavor=flavor)
    graph, config = load_graph(exported.path).graph, exported.source.config
    cache = [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in ("key", "value")]
    inputs, outputs = ({value.name: value for value in values} for values in (graph.input, graph.output))
    first = ["input_ids", "attention_mask", "position_ids"]
    assert list(inputs) == [*first, *(f"past_key_values.{name}" for name in cache)]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    for name in first:
        assert inputs[name].type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert all(isinstance(axis, str) for axis in axes(inputs[name]))
    assert axes(outputs["logits"]) == ["batch_size", "sequence_length", config.vocab_size]
    for name in cache:
        batch, heads, length, head_dim = axes(inputs[f"past_key_values.{name}"])
        assert (heads, head_dim) == (config.num_kv_heads, config.head_dim)
        assert isinstance(batch, str)
        assert isinstance(length, str)
        assert axes(outputs[f"present.{name}"])[2] != length


SCHEMES = [
    QuantScheme(4, group_size=16),
    QuantScheme(4, group_size=32, symmetric=False),
    QuantScheme(4, group_size=32, scale_dtype="fp32"),
    QuantScheme(8, group_size=32, symmetric=False),
    QuantScheme(2, group_size=16),
    QuantScheme(2, group_size=32, symmetric=False),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.label}-{s.scale_dtype}")
def test_other_schemes(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    """96 inputs in groups of 32 make an odd number of zero points, whose last byte is half empty."""
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", ("*", scheme))
    result = export_onnx(checkpoint, tmp_path / "onnx", accuracy_level=0)
    check_codes(Exported(tmp_path / "onnx", result, checkpoint))
    ids = [random_ids(40)]
    assert largest_difference(logits(tmp_path / "onnx", ids), logits(checkpoint.folder, ids)) < SAME
    assert result["exact"] is True
    assert result["inexact_tensors"] == []


def test_mixed_recipe(make_checkpoint: Callable, tmp_path: Path) -> None:
    rules = [
        ("*.layers.1.self_attn.q_proj", None),
        ("*.down_proj", QuantScheme(8, group_size=32)),
        ("*", QuantScheme(4, group_size=32, symmetric=False)),
    ]
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", *rules)
    check_codes(Exported(tmp_path / "onnx", export_onnx(checkpoint, tmp_path / "onnx", accuracy_level=0), checkpoint))
    ids = [random_ids(40)]
    assert largest_difference(logits(tmp_path / "onnx", ids), logits(checkpoint.folder, ids)) < SAME


def test_largest_group_that_onnxruntime_takes(make_checkpoint: Callable, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=512, intermediate_size=512, head_dim=128)
    source, ids = make_checkpoint(config), [random_ids(24)]
    checkpoint = round_to_nearest(source, tmp_path / "quantized", ("*", QuantScheme(4, group_size=256)))
    export_onnx(checkpoint, tmp_path / "onnx", accuracy_level=0)
    assert largest_difference(logits(tmp_path / "onnx", ids), logits(checkpoint.folder, ids)) < SAME


def test_result_lists_the_files_and_two_exports_are_equal(onnx_folder: OnnxFolder, tmp_path: Path) -> None:
    exported = onnx_folder("gptq-w4a16-g128")
    again = export_onnx(exported.source, tmp_path / "again")
    assert again["files"] == exported.result["files"]
    assert {item["path"] for item in again["files"]} == {path.name for path in (tmp_path / "again").iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "qwen3-export.json"} <= {
        item["path"] for item in again["files"]
    }
    manifest = json.loads((tmp_path / "again" / "qwen3-export.json").read_text())
    assert (manifest["kind"], manifest["exact"], manifest["quantized"]["recipe"]) == ("onnx", True, "gptq-w4a16-g128")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported.source.folder / name).read_bytes()


def test_the_folder_can_be_moved(make_checkpoint: Callable, tmp_path: Path) -> None:
    export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "onnx")
    before = logits(tmp_path / "onnx", [random_ids(8)])
    moved = (tmp_path / "onnx").rename(tmp_path / "elsewhere")
    assert largest_difference(logits(moved, [random_ids(8)]), before) == 0
