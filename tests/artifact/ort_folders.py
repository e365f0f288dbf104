"""Recipes whose ONNX folders of flavor `ort` are tested, and a reader of the products in them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.tensor import QuantizedTensor
from tests.artifact.support import Exported, OnnxWeights, graph_name, low_bits_first

QUANTIZED = ["gptq-w4a16-g128", "gptq-w4a16-g32", "gptq-w4a16-g32-asym", "rtn-w8a16"]
EVERY = ["original", *QUANTIZED]


def read_matmul(weights: OnnxWeights, module: str) -> tuple[NDArray, NDArray, NDArray | None]:
    """Codes `[out, in]`, scales and zeros of a MatMulNBits node, after ONNX Runtime's ContribOperators.md."""
    node, rows = packed_rows(weights, module)
    values = weights.attributes(node)
    columns, bits, groups = values["K"], values["bits"], math.ceil(values["K"] / values["block_size"])
    _, blob, scales, *rest = weights.inputs(node)
    zeros = low_bits_first(rest[0], bits, groups)[rows] if rest else None
    return low_bits_first(blob, bits, columns)[rows], scales.reshape(-1, groups)[rows], zeros


PACKED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def packed_rows(weights: OnnxWeights, module: str) -> tuple[str, slice]:
    """The product that holds a linear, and its rows there: those of the Split behind it that has the linear's name."""
    node = graph_name(module)
    parent, _, name = node.rpartition(".")
    together = f"{parent}.{PACKED.get(name, name)}"
    split = next((n for n in weights.model.graph.node if n.name == f"{together}.split"), None)
    if split is None:
        return node, slice(None)
    sizes = weights.inputs(split.name)[1]
    place = list(split.output).index(f"{node}_out")
    return together, slice(int(sizes[:place].sum()), int(sizes[: place + 1].sum()))


def check_codes(exported: Exported) -> None:
    """Every quantized linear, without exception, is a MatMulNBits with exactly the checkpoint's numbers."""
    weights = OnnxWeights(exported.path)
    for module, shape in exported.linears.items():
        wanted = exported.source.linear(module)
        if not isinstance(wanted, QuantizedTensor):
            assert weights.node(graph_name(module)).op_type == "FusedMatMul"
            continue
        codes, scales, zeros = read_matmul(weights, module)
        assert codes.shape == shape
        np.testing.assert_array_equal(codes, wanted.codes, module)
        np.testing.assert_array_equal(scales, wanted.scales.astype(np.float32), module)
        if wanted.zeros is None:
            assert zeros is None
        else:
            np.testing.assert_array_equal(zeros, wanted.zeros, module)
