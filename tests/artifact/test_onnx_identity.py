"""Identity probes: a linear that is given the identity matrix answers with its own weights, turned.

Each product of a graph is cut out with what it is made of, and run in ONNX Runtime by itself. One wrong code, scale,
zero point or row shows, which logits could hide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.ort_folders import packed_rows
from tests.artifact.support import Exported, OnnxWeights, round_to_nearest
from tests.conftest import tiny_config

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


def answer_to_identity(weights: OnnxWeights, product: str, width: int) -> NDArray[np.float32]:
    """A product `[out, in]`, cut out of its graph: its node, and everything before it that is made of weights."""
    graph, node = weights.model.graph, weights.node(product)
    makers = {name: other for other in graph.node for name in other.output}
    nodes, needed = [node], list(node.input[1:])
    while needed:
        if (maker := makers.get(needed.pop())) is not None and maker not in nodes:
            nodes.insert(0, maker)
            needed += maker.input
    names = {name for item in nodes for name in item.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in names]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in (node.input[0], node.output[0])
    ]
    ends[0].type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 3)
    cut = onnx.helper.make_graph(nodes, "product", ends[:1], ends[1:], kept)
    model = onnx.helper.make_model(cut, opset_imports=weights.model.opset_import, ir_version=weights.model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {node.input[0]: np.eye(width, dtype=np.float32)[None]})[0][0].T


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
