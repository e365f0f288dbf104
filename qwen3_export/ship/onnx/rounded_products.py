"""Products whose inputs are rounded too, as TensorRT's parser takes them.

That is, as Q/DQ pairs with constant scales.

    one scale for all      x ─ Q(scale) ─ DQ(scale) ─▶ MatMul
    one per token          x / s ─ Q(1) ─ DQ(2^-9) ─▶ MatMul ─ · s · 2^9      s = max|x| / 127.5, or / 448 for E4M3
    one per 128 inputs     x / s ─ Q(1) ─ DQ(1) ─ · s ─▶ MatMul
    NVFP4                  x ─ TRT_FP4DynamicQuantize(scale) ─▶ codes, E4M3 scales
                           codes ─ DQ(E4M3 scales ─ DQ(scale)) ─▶ MatMul

A scale that is found as inputs come cannot stand in a pair: the parser wants constants. So inputs are divided by it
first and rounded in units of one, which is the same rounding; behind the product, a token's scale is multiplied back.
The product of integers or E4M3 then is one of the device's own kernels. 2^-9 keeps its sums within fp16. Where 128
inputs share a scale it goes back before the product, which the device computes in 16 bits. NVFP4 has an operator of
TensorRT's own, which finds the scales of 16 inputs; the scale above them is a constant.
"""

from __future__ import annotations

import numpy as np

from qwen3_export.core.scheme import ACTIVATION_GROUP
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx import qdq
from qwen3_export.ship.onnx.graph import TENSORRT, GraphBuilder
from qwen3_export.ship.onnx.library import ir

_FLOAT = ir.DataType.FLOAT
_SMALL = 2.0**-9


def product(
    graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor, matrix: ir.Value, dtype: ir.DataType, name: str
) -> ir.Value:
    """`x @ matrix` in the type of `x`.

    `x` is rounded as the weight's scheme says.
    """
    op, activations = graph.op, weight.scheme.activations
    if activations is None:
        return op("MatMul", [x, matrix], name)
    if activations == "static-tensor":
        return op("MatMul", [qdq.static_inputs(graph, x, weight, dtype, name), matrix], name)
    if weight.scheme.num_bits == 4:
        return op("MatMul", [_double_quantized(graph, x, weight, dtype, name), matrix], name)
    if activations == "dynamic-group":
        return op("MatMul", [_by_groups(graph, x, weight, dtype, name), matrix], name)
    wide = graph.as_type(x, dtype, _FLOAT, f"{name}.fp32")
    scale = qdq.dynamic_scale(graph, wide, weight.scheme, name)
    units = op("Div", [wide, scale], f"{name}.input.units")
    rounded = _rounded(graph, units, weight, dtype, _SMALL, name)
    summed = graph.as_type(op("MatMul", [rounded, matrix], name), dtype, _FLOAT, f"{name}.sum")
    back = op("Mul", [scale, graph.constant(1 / _SMALL, np.float32)], f"{name}.input.back")
    return graph.as_type(op("Mul", [summed, back], f"{name}.scaled"), _FLOAT, dtype, f"{name}.out")


def _double_quantized(
    graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor, dtype: ir.DataType, name: str
) -> ir.Value:
    """Inputs rounded to NVFP4 and multiplied back in `dtype`, as the weights are."""
    length, scale = weight.scheme.activation_group, np.float32(weight.input_scale)
    codes, inner = graph.ops(
        "TRT_FP4DynamicQuantize", [x, graph.constant(scale, np.float32)], f"{name}.input.quantized",
        [f"{name}.input.codes", f"{name}.input.inner"], TENSORRT,
        axis=-1, block_size=length, scale_type=ir.DataType.FLOAT8E4M3FN,
    )  # fmt: skip
    outer = graph.constant(scale.astype(dtype.numpy()), dtype.numpy())
    scales = graph.op("DequantizeLinear", [inner, outer], f"{name}.input.scales")
    return graph.op("DequantizeLinear", [codes, scales], f"{name}.input", axis=-1, block_size=length)


def _by_groups(graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor, dtype: ir.DataType, name: str) -> ir.Value:
    op, constant, width = graph.op, graph.constant, weight.shape[1]
    shape = constant([0, 0, width // ACTIVATION_GROUP, ACTIVATION_GROUP])
    groups = op("Reshape", [x, shape], f"{name}.input.groups")
    wide = graph.as_type(groups, dtype, _FLOAT, f"{name}.fp32")
    scale = qdq.dynamic_scale(graph, wide, weight.scheme, name)
    units = op("Div", [wide, scale], f"{name}.input.units")
    rounded = _rounded(graph, units, weight, _FLOAT, 1.0, name)
    scaled = graph.as_type(op("Mul", [rounded, scale], f"{name}.input.scaled"), _FLOAT, dtype, f"{name}.input.cast")
    return op("Reshape", [scaled, constant([0, 0, width])], f"{name}.input")


def _rounded(
    graph: GraphBuilder, units: ir.Value, weight: QuantizedTensor, dtype: ir.DataType, factor: float, name: str
) -> ir.Value:
    """fp32 units as codes, times a constant factor, in `dtype`."""
    kind = ir.DataType.INT8 if weight.scheme.type == "int" else ir.DataType.FLOAT8E4M3FN
    zero = graph.weight(f"zero.{kind.name.lower()}", np.zeros(1, np.uint8), kind, ())
    one, constant = graph.constant(1.0, np.float32), np.asarray(factor, np.float32).astype(dtype.numpy())
    codes = graph.op("QuantizeLinear", [units, one, zero], f"{name}.input.quantized")
    return graph.op("DequantizeLinear", [codes, graph.constant(constant, dtype.numpy()), zero], f"{name}.input.codes")
