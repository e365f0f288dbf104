"""Int8 weights beside int8 inputs in both flavors: codes unchanged, products exact, logits those of the folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai as genai
import pytest
from numpy.typing import NDArray

from qwen3_export.core.processors import sums_int8_exactly
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.run import ort_settings
from qwen3_export.run.parted import PartedModel
from qwen3_export.ship.onnx import export_onnx, w8a8
from qwen3_export.ship.onnx.graph import GraphBuilder
from tests.artifact.ort_folders import packed_rows
from tests.artifact.support import (
    OnnxWeights,
    largest_difference,
    load_graph,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
)
from tests.conftest import random_tensors, tiny_config

TOKEN = QuantScheme(8, strategy="channel", activations="dynamic-token")
STATIC = QuantScheme(8, strategy="tensor", activations="static-tensor")


@pytest.mark.parametrize("scheme", [TOKEN, STATIC], ids=lambda scheme: scheme.label)
def test_a_product_is_that_of_integers(tmp_path: Path, scheme: QuantScheme) -> None:
    """Against sums of int64 products, for codes and inputs at the ends of their range, where kernels may saturate."""
    random, shape = np.random.default_rng(0), (48, 256)
    codes = random.integers(0, 256, shape).astype(np.uint8)
    codes[:8] = np.where(codes[:8] > 127, 255, 0)
    scales = (random.integers(128, 256, scheme.grid(shape)) * 2.0**-15).astype(SCALE_TYPES["bf16"])
    static = 0.02 if scheme is STATIC else None
    weight = QuantizedTensor("w", shape, scheme, codes, scales, input_scale=static)
    x = random.standard_normal((1, 9, 256)).astype(np.float32)
    x[0, 0], x[0, 1] = 0, np.sign(x[0, 1])
    with GraphBuilder(tmp_path, 21) as graph:
        value = graph.input("x", ir.DataType.FLOAT, ["b", "s", 256])
        out = w8a8.linear(graph, value, weight, ir.DataType.FLOAT, "w")
        graph.output(out, "y", ir.DataType.FLOAT, ["b", "s", 48])
        graph.save({})
    options = onnxruntime.SessionOptions()
    for key, entry in () if sums_int8_exactly() else w8a8.SESSION.items():
        options.add_session_config_entry(key, entry)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options).run(None, {"x": x})
    tiny = np.finfo(np.float32).tiny
    unit = np.float32(0.02) if static else np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127.5), tiny)
    rounded = np.clip(np.round(x / unit), -128, 127).astype(np.int64)
    sums = rounded @ (codes.astype(np.int64) - 128).T
    wanted = sums.astype(np.float32) * unit * scales.astype(np.float32).reshape(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_a_folder(onnx_folder: Callable, torch_logits: Callable, rows: list[NDArray], flavor: str) -> None:
    exported = onnx_folder("int8-dynamic", flavor=flavor)
    assert exported.result["exact"]
    counts = Counter(node.op_type for node in load_graph(exported.path).graph.node)
    # q, k and v are one product in ORT's flavor, gate and up another.
    assert counts["MatMulInteger"] == {"ort": 4, "standard": 7}[flavor] * exported.source.config.num_layers
    weights = OnnxWeights(exported.path)
    for module in exported.linears:
        wanted = exported.source.linear(module)
        assert isinstance(wanted, QuantizedTensor)
        node, rows_of = packed_rows(weights, module)
        codes = weights.inputs(node)[1]
        assert codes is not None
        np.testing.assert_array_equal(codes.T[rows_of].astype(np.int16) + 128, wanted.codes)
    # A value near the middle of two steps may fall to either side in another order of sums.
    assert mean_kl(torch_logits("int8-dynamic"), logits(exported.path, rows)) < 5e-4
    if flavor == "standard":
        onnx.checker.check_model(str(exported.path / "model.onnx"), full_check=True)


TABLES = {
    "8 bits": QuantScheme(8, group_size=32),
    "8 bits per channel": QuantScheme(8, strategy="channel"),
    "8 bits, zero points": QuantScheme(8, group_size=32, symmetric=False),
    "4 bits": QuantScheme(4, group_size=32),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_beside_dequantized_matrices_products_are_exact(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: QuantScheme, tied: bool
) -> None:
    """Codes of the one W8A8 matrix are all at the ends of their range: sums that saturate move logits by 3."""
    shape = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128}
    config, down = tiny_config(**shape, tie_word_embeddings=tied), "model.layers.0.mlp.down_proj"
    tensors = random_tensors(parse_config(config, "test"))
    name = f"{down}.weight"
    tensors[name] = (np.sign(tensors[name].astype(np.float32)) / 8).astype(tensors[name].dtype)
    outer = [(EMBEDDING, table)] if tied else [(EMBEDDING, table), (HEAD, table)]
    rules = (*outer, (down, TOKEN), ("*.v_proj", table), ("*", None))
    checkpoint = round_to_nearest(make_checkpoint(config, tensors), tmp_path / "quantized", *rules)
    folder, ids = tmp_path / "onnx", random_ids(24)
    export_onnx(checkpoint, folder, flavor="standard")
    truth = logits(checkpoint.folder, [ids])
    parts = PartedModel(folder)
    in_parts = [np.concatenate([piece for ((piece,),) in parts.logits(parts.stream([[ids]]))], -1)]
    for found in (logits(folder, [ids]), in_parts):
        assert largest_difference(truth, found) < 0.05
    # A processor of the other kind, as far as our session knows.
    for sums in (True, False):
        monkeypatch.setattr(ort_settings, "sums_int8_exactly", lambda sums=sums: sums)
        assert ort_settings.exact_sums(folder / "model.onnx") == ({} if sums else ort_settings.EXACT_SUMS)
    assert largest_difference(truth, logits(folder, [ids])) < 0.05


def test_beside_pairs_the_settings_stay_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tool's graph, which has a product of each kind, opens as it did."""
    monkeypatch.setattr(ort_settings, "sums_int8_exactly", lambda: False)
    number, one = onnx.TensorProto, onnx.helper.make_node
    nodes = [
        one("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        one("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
        one("DequantizeLinear", ["matrix", "scale", "zero"], ["weight"]),
        one("MatMul", ["rounded", "weight"], ["y"]),
        one("DynamicQuantizeLinear", ["x"], ["bytes", "unit", "middle"]),
        one("MatMulInteger", ["bytes", "matrix", "middle"], ["sums"]),
    ]
    constants = {"scale": np.float32(0.02), "zero": np.int8(0), "matrix": np.full((8, 4), 127, np.int8)}
    ends = [("y", number.FLOAT), ("sums", number.INT32)]
    graph = onnx.helper.make_graph(
        nodes,
        "pairs",
        [onnx.helper.make_tensor_value_info("x", number.FLOAT, [1, 8])],
        [onnx.helper.make_tensor_value_info(end, kind, [1, 4]) for end, kind in ends],
        [onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    assert ort_settings.exact_sums(path) == {}
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_genai_runs_it_and_is_told_not_to_saturate(onnx_folder: Callable) -> None:
    folder = onnx_folder("int8-dynamic", flavor="ort").path
    options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["session.x64quantprecision"] == "1"
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(list(range(5, 21)))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 16
