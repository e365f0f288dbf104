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
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.ship.onnx import w8a8
from qwen3_export.ship.onnx.graph import GraphBuilder
from tests.artifact.ort_folders import packed_rows
from tests.artifact.support import OnnxWeights, load_graph, logits, mean_kl

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
