"""Int8 weights beside int8 activations as `MatMulInteger` of ai.onnx.

Codes are unchanged, and products exact.

    x ─ / scale ─ round ─ clamp ─ + 128 ─▶ uint8 ┐
                        weight, int8 [in, out] ──┴ MatMulInteger (zero point 128) ─▶ int32 ─ · scale · weight scales

The scale is that of each token, max|x| / 127.5, or a static scheme's one, as compressed-tensors computes them. Inputs
are stored as uint8 because ONNX Runtime's kernels for uint8 × int8 are the fast ones. On x86 without VNNI they
saturate, unless the session is opened with `session.x64quantprecision` = 1.
"""

from __future__ import annotations

import numpy as np

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx import qdq
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

# What ONNX Runtime must be told, where its kernels would saturate.
SESSION = {"session.x64quantprecision": "1"}
_FLOAT = ir.DataType.FLOAT


def fits(scheme: QuantScheme) -> bool:
    """Whether a scheme is int8 weights beside int8 inputs.

    The weights have one scale per row or matrix, the inputs one per token or all.
    """
    whole = (scheme.type, scheme.num_bits, scheme.symmetric) == ("int", 8, True)
    return whole and scheme.strategy in ("channel", "tensor") and scheme.activations in _ROUNDINGS


_ROUNDINGS = ("dynamic-token", "static-tensor")


def joins(weight: QuantizedTensor) -> bool:
    """Whether linears of the same inputs can be one product of W8A8."""
    return weight.scheme.strategy == "channel" and weight.scheme.activations == "dynamic-token"


def linear(graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor, dtype: ir.DataType, name: str) -> ir.Value:
    """`x @ weight.T` with both rounded to int8, in the type of `x`."""
    op, constant = graph.op, graph.constant
    x = graph.as_type(x, dtype, _FLOAT, f"{name}.fp32")
    scale = (
        constant(weight.input_scale, np.float32)
        if weight.input_scale
        else qdq.dynamic_scale(graph, x, weight.scheme, name)
    )
    whole = op("Round", [op("Div", [x, scale], f"{name}.input.units")], f"{name}.input.whole")
    clipped = op("Clip", [whole, constant(-128, np.float32), constant(127, np.float32)], f"{name}.input.clipped")
    moved = op("Add", [clipped, constant(128, np.float32)], f"{name}.input.moved")
    codes = op("Cast", [moved], f"{name}.input.uint8", to=ir.DataType.UINT8)
    matrix = graph.weight(f"{name}.codes", (weight.codes ^ np.uint8(128)).view(np.int8).T)
    product = op("MatMulInteger", [codes, matrix, constant(128, np.uint8)], name)
    scales = weight.scales32[:, 0] if weight.scheme.strategy == "channel" else weight.scales32.reshape(1)
    summed = op("Mul", [op("Cast", [product], f"{name}.sum", to=_FLOAT), scale], f"{name}.scaled")
    whole_sum = op("Mul", [summed, graph.weight(f"{name}.scales", scales)], f"{name}.out")
    return graph.as_type(whole_sum, _FLOAT, dtype, f"{name}.cast")
