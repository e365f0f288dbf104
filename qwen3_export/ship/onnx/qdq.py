"""Quantized matrices as `DequantizeLinear`, and static inputs as a Q/DQ pair: ai.onnx operators alone.

    scheme                         codes [in, out]   scales                    DequantizeLinear
    int4, int8, groups             INT4, INT8        [groups, out]             axis 0, block_size
    int4, int8, channel            INT4, INT8        [out]                     axis 1
    with zero points               UINT4, UINT8      and zeros like scales
    FP8 tensor, channel, groups    FLOAT8E4M3FN      scalar, [out], [groups, out]
    FP8 blocks of 128 × 128        FLOAT8E4M3FN      [groups, out], each repeated for its 128 outputs
    MXFP4, MXFP8, groups of 32     FLOAT4E2M1, FLOAT8E4M3FN   [groups, out]: powers of two as floats
    NVFP4, groups of 16            FLOAT4E2M1        E4M3 [groups, out], dequantized by 1 / global scale first

Codes are never changed. `static_inputs` and `rounded_inputs` write how a scheme rounds a linear's inputs;
`ship.onnx.rounded_products` does for TensorRT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import pack
from qwen3_export.core.scheme import ACTIVATION_GROUP, QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

_CODES = {
    ("int", 4, True): ir.DataType.INT4,
    ("int", 4, False): ir.DataType.UINT4,
    ("int", 8, True): ir.DataType.INT8,
    ("int", 8, False): ir.DataType.UINT8,
    ("float", 4, True): ir.DataType.FLOAT4E2M1,
    ("float", 8, True): ir.DataType.FLOAT8E4M3FN,
}


def supports(scheme: QuantScheme) -> str | None:
    """Why `DequantizeLinear` cannot hold a scheme's weights, or None when it can."""
    if scheme.type == "kquant":
        return f"{scheme.label} is a block type of ggml: its scales have no place outside of GGUF"
    if (scheme.type, scheme.num_bits, scheme.symmetric) not in _CODES:
        return f"DequantizeLinear has no {scheme.num_bits}-bit type"
    return None


def codes(graph: GraphBuilder, values: NDArray[np.uint8], scheme: QuantScheme, name: str) -> ir.Value:
    """Codes, or zero points, in the given order.

    Symmetric integers become signed by flipping the top bit.
    """
    ordered = np.ascontiguousarray(values)
    if scheme.type == "int" and scheme.symmetric:
        ordered = ordered ^ np.uint8(scheme.midpoint)
    packed = pack.pack_bytes(ordered.reshape(-1), scheme.num_bits)
    return graph.weight(name, packed, _CODES[scheme.type, scheme.num_bits, scheme.symmetric], ordered.shape)


def dequantized(graph: GraphBuilder, weight: QuantizedTensor, dtype: ir.DataType, name: str) -> ir.Value:
    """The matrix `[in, out]` in the type of activations.

    Scales have the activations' type: with a Cast behind `DequantizeLinear` TensorRT does not fuse the multiplication.
    """
    scheme = weight.scheme
    inputs: list[ir.Value | None] = [codes(graph, weight.codes.T, scheme, f"{name}.codes")]
    inputs.append(_scales(graph, weight, dtype, name))
    if weight.zeros is not None:
        zeros = weight.zeros[:, 0] if scheme.strategy == "channel" else weight.zeros
        inputs.append(codes(graph, zeros.T, scheme, f"{name}.zeros"))
    return graph.op("DequantizeLinear", inputs, f"{name}.dequantized", **_layout(scheme, weight.shape[1]))


def _layout(scheme: QuantScheme, in_features: int) -> dict[str, Any]:
    """The axis of `[in, out]` codes along which scales vary."""
    if scheme.strategy == "tensor":
        return {}
    if scheme.strategy == "channel":
        return {"axis": 1}
    return {"axis": 0, "block_size": scheme.group_length(in_features)}


def _scales(graph: GraphBuilder, weight: QuantizedTensor, dtype: ir.DataType, name: str) -> ir.Value:
    scheme, stored, kind = weight.scheme, weight.scales, dtype.numpy()
    if weight.global_scale is not None:
        inner = graph.weight(f"{name}.scales", np.ascontiguousarray(stored.T))
        outer = graph.weight(f"{name}.global_scale", np.array(1 / np.float32(weight.global_scale)).astype(kind))
        return graph.op("DequantizeLinear", [inner, outer], f"{name}.scales.dequantized")
    if scheme.strategy == "tensor":
        return graph.weight(f"{name}.scales", stored.astype(kind).reshape(()))
    if scheme.strategy == "channel":
        return graph.weight(f"{name}.scales", np.ascontiguousarray(stored[:, 0].astype(kind)))
    if scheme.strategy == "block":
        tall = scheme.rows_per_scale(weight.shape[0])
        stored = np.repeat(stored, tall, axis=0)[: weight.shape[0]]
    return graph.weight(f"{name}.scales", np.ascontiguousarray(stored.astype(kind).T))


def static_inputs(
    graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor | NDArray, dtype: ir.DataType, name: str
) -> ir.Value:
    """Inputs of a static scheme as a Q/DQ pair with its scale; others unchanged."""
    if not isinstance(weight, QuantizedTensor) or weight.input_scale is None:
        return x
    kind = ir.DataType.INT8 if weight.scheme.type == "int" else ir.DataType.FLOAT8E4M3FN
    scale = graph.constant(np.asarray(weight.input_scale, np.float32).astype(dtype.numpy()), dtype.numpy())
    zero = graph.weight(f"zero.{kind.name.lower()}", np.zeros(1, np.uint8), kind, ())
    rounded = graph.op("QuantizeLinear", [x, scale, zero], f"{name}.input.quantized")
    return graph.op("DequantizeLinear", [rounded, scale, zero], f"{name}.input")


def rounded_inputs(graph: GraphBuilder, x: ir.Value, weight: QuantizedTensor | NDArray, name: str) -> ir.Value:
    """Inputs rounded as the scheme says, in fp32.

    There is one scale, or one per token or per 128 inputs.

    x → clamp(round(x / scale)) · scale, dynamic scales max|x| / 127.5 for int8 and max|x| / 448 for E4M3, as
    compressed-tensors computes them. E4M3 rounds by a Cast to the type and back: ONNX Runtime 1.31 takes a Q/DQ pair
    of that type for one of integers, and then refuses the graph.
    """
    if not isinstance(weight, QuantizedTensor) or weight.scheme.activations is None:
        return x
    fixed = None if weight.input_scale is None else graph.constant(weight.input_scale, np.float32)
    return rounded_rows(graph, x, weight.scheme, (0, 0, weight.shape[1]), fixed, name)


def rounded_rows(
    graph: GraphBuilder, x: ir.Value, scheme: QuantScheme, shape: tuple[int, ...], fixed: ir.Value | None, name: str
) -> ir.Value:
    """As `rounded_inputs`, for rows of one scheme.

    `shape` is that of `x` with 0 for an axis that is not known; `fixed` is a static scheme's scale.
    """
    if fixed is not None:
        return _in_units(graph, x, fixed, scheme, name)
    if scheme.activations == "dynamic-token":
        return _in_units(graph, x, dynamic_scale(graph, x, scheme, name), scheme, name)
    groups = graph.constant([*shape[:-1], shape[-1] // ACTIVATION_GROUP, ACTIVATION_GROUP])
    x = graph.op("Reshape", [x, groups], f"{name}.input.groups")
    x = _in_units(graph, x, dynamic_scale(graph, x, scheme, name), scheme, name)
    return graph.op("Reshape", [x, graph.constant(shape)], f"{name}.input.flat")


def dynamic_scale(graph: GraphBuilder, x: ir.Value, scheme: QuantScheme, name: str) -> ir.Value:
    """The dynamic scale of the last axis.

    It brings the largest number to the end of the type's range.
    """
    size = graph.op("Abs", [x], f"{name}.input.abs")
    largest = graph.op("ReduceMax", [size, graph.constant([-1])], f"{name}.input.max", keepdims=1)
    unit = graph.constant(448.0 if scheme.type == "float" else 127.5, np.float32)
    share = graph.op("Div", [largest, unit], f"{name}.input.share")
    return graph.op("Max", [share, graph.constant(np.finfo(np.float32).tiny, np.float32)], f"{name}.input.scale")


def _in_units(graph: GraphBuilder, x: ir.Value, scale: ir.Value, scheme: QuantScheme, name: str) -> ir.Value:
    op, units = graph.op, graph.op("Div", [x, scale], f"{name}.input.units")
    if scheme.type == "float":
        small = op("Cast", [units], f"{name}.input.e4m3", to=ir.DataType.FLOAT8E4M3FN)
        whole = op("Cast", [small], f"{name}.input.rounded", to=ir.DataType.FLOAT)
    else:
        bounds = [graph.constant(bound, np.float32) for bound in (-128.0, 127.0)]
        whole = op("Clip", [op("Round", [units], f"{name}.input.whole"), *bounds], f"{name}.input.rounded")
    return op("Mul", [whole, scale], f"{name}.input.scaled")


def inexact_scales(weight: QuantizedTensor, dtype: ir.DataType) -> float:
    """Largest relative error of the scales that a runtime multiplies by, 0 if exact.

    NVFP4's are the product of two numbers: the quotient by the global scale is rounded to `dtype`. MXFP's powers of
    two may lie outside of its range.
    """
    kind, found = dtype.numpy(), weight.scales.astype(np.float32)
    if weight.global_scale is not None:
        factor = np.array(1 / np.float32(weight.global_scale)).astype(kind)
        found = found * factor.astype(np.float32)
    with np.errstate(over="ignore"):
        found = found.astype(kind).astype(np.float32)
    wanted = weight.scales32
    return float(np.max(np.abs(found - wanted) / np.maximum(np.abs(wanted), np.finfo(np.float32).tiny), initial=0))


def inexact_number(number: float, dtype: ir.DataType) -> float:
    """Relative error of a number in `dtype`; infinity where it becomes 0 or infinite.

    Folders store an inverse in fp32: a difference as small as that type's own rounding is no error.
    """
    stored = float(np.array(number).astype(dtype.numpy()))
    if not 0 < stored < np.inf:
        return np.inf
    error = abs(stored / number - 1)
    return error if error > np.finfo(np.float32).eps else 0.0
