"""Identity probes: a linear that is given the identity matrix answers with its own weights, turned.

Each product of a graph is cut out with what it is made of, and run in ONNX Runtime by itself. One wrong code, scale,
zero point or row shows, which logits could hide. Experts are cut out with what follows the router's scores, and asked
one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.processors import sums_int8_exactly
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.run.ort_settings import EXACT_SUMS
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.onnx.experts import LOOP, QMOE
from tests.artifact.ort_folders import packed_rows
from tests.artifact.support import Exported, OnnxWeights, round_to_nearest, tiny_with_tokenizer
from tests.conftest import random_tensors, tiny_config, tiny_moe_config

SCHEMES = {
    "16 bits": None,
    "w4": QuantScheme(4, group_size=32),
    "w4, zero points": QuantScheme(4, group_size=16, symmetric=False),
    "w4, signed scales": QuantScheme(4, group_size=32, signed_scales=True),
    "w8": QuantScheme(8, group_size=32),
    "w8, zero points": QuantScheme(8, group_size=32, symmetric=False),
    "w2": QuantScheme(2, group_size=32),
    "w8 per channel": QuantScheme(8, strategy="channel"),
    "fp8 per channel": QuantScheme(8, type="float", strategy="channel"),
    "fp8 blocks": QuantScheme(8, type="float", strategy="block"),
}
CASES = [
    *(
        ("ort", name)
        for name in ("16 bits", "w4", "w4, zero points", "w4, signed scales", "w8", "w8, zero points", "w2")
    ),
    *(("standard", name) for name in SCHEMES if name != "w2"),
]


def answer(weights: OnnxWeights, output: str, given: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """A value of a graph, computed by the nodes behind it from values that are given."""
    graph, names, needed = weights.model.graph, set[str](), [output]
    makers = {name: node for node in graph.node for name in node.output}
    while needed:
        if (name := needed.pop()) not in names:
            names.add(name)
            if name in makers and name not in given:
                needed += reads(makers[name])
    nodes = [node for node in graph.node if names & set(node.output) - given.keys()]
    kept = [tensor for tensor in graph.initializer if tensor.name in names]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (*given, output)]
    for end, axes in zip(ends, [*(array.ndim for array in given.values()), 3], strict=True):
        end.type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * axes)
    cut = onnx.helper.make_graph(nodes, "cut", ends[:-1], ends[-1:], kept)
    model = onnx.helper.make_model(cut, opset_imports=weights.model.opset_import, ir_version=weights.model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, entry in () if sums_int8_exactly() else EXACT_SUMS.items():
        options.add_session_config_entry(key, entry)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, given)[0]
    return found


def reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads, in its body too."""
    bodies = [inner for item in node.attribute for inner in item.g.node]
    return [*filter(None, node.input), *(name for inner in bodies for name in reads(inner))]


def answer_to_identity(weights: OnnxWeights, product: str, width: int) -> NDArray[np.float32]:
    """A product `[out, in]`, from its node alone."""
    node = weights.node(product)
    return answer(weights, node.output[0], {node.input[0]: np.eye(width, dtype=np.float32)[None]})[0].T


def weight(exported: Exported, module: str) -> NDArray[np.float32]:
    tensor = exported.source.linear(module)
    return dequantize(tensor) if isinstance(tensor, QuantizedTensor) else tensor.astype(np.float32)


@pytest.mark.parametrize(("flavor", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_every_linear_answers_with_its_weights(
    make_checkpoint: Callable, tmp_path: Path, flavor: str, name: str
) -> None:
    """The head too, tied or not by turns; sums of one product and zeros are that product, bit for bit."""
    scheme = SCHEMES[name]
    config = tiny_config(hidden_size=128, intermediate_size=192, tie_word_embeddings="zero" in name)
    outer = [] if scheme is None or scheme.type == "float" else [(EMBEDDING, scheme), (HEAD, scheme)]
    rules = (*outer[: 1 if config["tie_word_embeddings"] else 2], ("*", scheme))
    source = make_checkpoint(config)
    checkpoint = round_to_nearest(source, tmp_path / "quantized", *rules) if scheme else open_checkpoint(source)
    export_onnx(checkpoint, tmp_path / "onnx", flavor, accuracy_level=0)
    exported, weights = Exported(tmp_path / "onnx", {}, checkpoint), OnnxWeights(tmp_path / "onnx")
    for module, (_, width) in exported.linears.items():
        product, rows = packed_rows(weights, module)
        np.testing.assert_array_equal(
            answer_to_identity(weights, product, width)[rows], weight(exported, module), module
        )
    table = EMBEDDING if config["tie_word_embeddings"] else HEAD
    product = next(node.name for node in weights.model.graph.node if node.name in ("head", HEAD))
    found = answer_to_identity(weights, product, config["hidden_size"])
    np.testing.assert_array_equal(found, weight(exported, table), "head")


# Int8 inputs: one of the identity's becomes a whole code, which the weights' codes are multiplied by.


INT8 = {
    "dynamic": QuantScheme(8, strategy="channel", activations="dynamic-token"),
    "static": QuantScheme(8, strategy="tensor", activations="static-tensor"),
}


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("scheme", INT8.values(), ids=INT8.keys())
def test_int8_linears_answer_with_their_weights(
    reference_folder: Path, tmp_path: Path, scheme: QuantScheme, flavor: str
) -> None:
    """Bit for bit: a product of whole numbers, times the input's scale, times the weights'."""
    source = tiny_with_tokenizer(tmp_path / "tiny", reference_folder)
    checkpoint = round_to_nearest(source, tmp_path / "quantized", ("*", scheme))
    export_onnx(checkpoint, tmp_path / "onnx", flavor)
    exported, weights = Exported(tmp_path / "onnx", {}, checkpoint), OnnxWeights(tmp_path / "onnx")
    assert exported.linears
    for module, (_, width) in exported.linears.items():
        product, rows = packed_rows(weights, module)
        assert weights.node(product).op_type == "MatMulInteger"
        tensor = checkpoint.linear(module)
        assert isinstance(tensor, QuantizedTensor)
        # A token's largest input becomes 127, a static scale's hundredfold 100.
        unit = np.float32(tensor.input_scale or 1 / np.float32(127.5))
        code = 100 if tensor.input_scale else 127
        given = np.eye(width, dtype=np.float32)[None] * (100 * unit if tensor.input_scale else 1)
        x, out = weights.node(f"{product}.input.units").input[0], weights.node(f"{product}.out").output[0]
        whole = (code * (tensor.codes.astype(np.int32) - 128)).astype(np.float32)
        found = answer(weights, out, {x: given})[0].T[rows]
        np.testing.assert_array_equal(found, whole * unit * tensor.scales.astype(np.float32), module)


# Experts: in each layer one of the three matrices is at random, and the other two let it through.


EXPERTS = {
    "QMoE, 4 bits": (QuantScheme(4, group_size=32), "ort", QMOE),
    "QMoE, zero points": (QuantScheme(4, group_size=16, symmetric=False), "ort", QMOE),
    "QMoE, 4 bits per channel": (QuantScheme(4, strategy="channel"), "ort", QMOE),
    "QMoE, 8 bits per channel": (QuantScheme(8, strategy="channel"), "ort", QMOE),
    "QMoE, 2 bits": (QuantScheme(2, group_size=16), "ort", QMOE),
    "loop, 16 bits": (None, "ort", LOOP),
    "loop, 4 bits": (QuantScheme(4, group_size=32), "standard", LOOP),
    "loop, zero points": (QuantScheme(4, group_size=16, symmetric=False), "standard", LOOP),
    "loop, 8 bits": (QuantScheme(8, group_size=32), "ort", LOOP),
    "loop, 2 bits": (QuantScheme(2, group_size=32, symmetric=False), "standard", LOOP),
}
SIDE, PARTS = 128, ("gate", "up", "down")


def open_experts() -> tuple[dict[str, Any], dict[str, NDArray]]:
    """A model of three layers, whose experts show their gate, their up and their down matrix.

    A gate of 32 everywhere lets `up` through as a product, since silu(32) is 32; an up matrix of ones keeps silu of the
    gate; the identity as up or down matrix sends a product on as it is.
    """
    config = tiny_moe_config(hidden_size=SIDE, moe_intermediate_size=SIDE, num_experts=4, num_hidden_layers=3)
    tensors = random_tensors(parse_config(config, "test"))
    opened = [{"up": "ones", "down": "eye"}, {"gate": "ones", "down": "eye"}, {"gate": "ones", "up": "eye"}]
    for layer, parts in enumerate(opened):
        for expert in range(4):
            for part, kind in parts.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                matrix = np.eye(SIDE) if kind == "eye" else np.full((SIDE, SIDE), 32 if part == "gate" else 1)
                tensors[name] = matrix.astype(tensors[name].dtype)
    return config, tensors


@pytest.mark.parametrize(("scheme", "flavor", "operator"), EXPERTS.values(), ids=EXPERTS.keys())
def test_every_expert_answers_with_its_weights(
    make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme | None, flavor: str, operator: str
) -> None:
    """Sums have one term that is not zero; only silu and two factors are rounded."""
    source = make_checkpoint(*open_experts())
    rule = ("*.experts.*", scheme)
    checkpoint = round_to_nearest(source, tmp_path / "quantized", rule) if scheme else open_checkpoint(source)
    result = export_onnx(checkpoint, tmp_path / "onnx", flavor, accuracy_level=0)
    assert [(item["operator"], item["layers"]) for item in result["expert_layers"]] == [(operator, [0, 1, 2])]
    exported, weights = Exported(tmp_path / "onnx", {}, checkpoint), OnnxWeights(tmp_path / "onnx")
    identity = np.eye(SIDE, dtype=np.float32)[None]
    for layer in range(3):
        first, last = (f"layer.{layer}.experts{end if operator == LOOP else ''}" for end in (".rows", ".out"))
        x, out = weights.node(first).input[0], weights.node(last).output[0]
        scores = weights.node(f"layer.{layer}.experts.router").output[0]
        for expert in range(4):
            # The router is so sure that the second expert counts nothing.
            sure = np.full((SIDE, 4), -1e4, np.float32)
            sure[:, expert] = 0
            found = answer(weights, out, {x: identity, scores: sure})[0].T
            module = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (weight(exported, f"{module}.{part}_proj").astype(np.float64) for part in PARTS)
            wanted = down @ (gate / (1 + np.exp(-gate)) * up)
            np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6 * np.abs(wanted).max(), err_msg=module)
