"""Experts in ai.onnx operators: a loop over the experts that the router chose.

    scores ─ Softmax ─ TopK ─▶ which experts, which weights       [tokens, k]
    Unique ─▶ the experts that were chosen at all
    Loop: tokens of one expert ─ Gemm gate, up ─ silu · up ─ Gemm down ─ · weight ─▶ added to their rows

Codes lie packed in bytes, because no operator gathers 4-bit types; an expert's are unpacked and dequantized when
its turn comes, so one expert is expanded at a time. A packed row holds its parts one after the other: byte j has
code j in its lowest bits, code j + row bytes above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx import qdq
from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.qmoe import router_scores

_INT64, _BOOL, _FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT
# The number of each E4M3 code; no tensor holds the two of NaN.
_E4M3 = np.nan_to_num(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def experts(graph: GraphBuilder, x: ir.Value, layer: SparseLayer, dtype: ir.DataType) -> ir.Value:
    """The sum of the chosen experts' outputs, in the shape of `x`.

    `x` is `[batch, sequence, hidden]`.
    """
    config, name, op, constant = layer.checkpoint.config, layer.name, graph.op, graph.constant
    scores = router_scores(graph, x, layer, dtype)
    chosen, mix = chosen_experts(graph, scores, layer, dtype)
    used = graph.ops("Unique", [op("Reshape", [chosen, constant([-1])], f"{name}.flat")], name, [f"{name}.used"])[0]
    rows = op("Reshape", [x, constant([-1, config.hidden_size])], f"{name}.rows")
    # ONNX Runtime adds to rows in fp32 alone.
    nothing = op(
        "Mul", [graph.as_type(rows, dtype, _FLOAT, f"{name}.wide"), constant(0, np.float32)], f"{name}.nothing"
    )
    stacks = {part: _stored(graph, layer, part, dtype) for part in layer.parts}
    body = _body(graph, layer, (rows, chosen, mix, used), stacks, dtype)
    count = op("Size", [used], f"{name}.count")
    total = op("Loop", [count, None, nothing], f"{name}.loop", body=body)
    total = graph.as_type(total, _FLOAT, dtype, f"{name}.sum")
    return op("Reshape", [total, op("Shape", [x], f"{name}.shape")], f"{name}.out")


def chosen_experts(
    graph: GraphBuilder, scores: ir.Value, layer: SparseLayer, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Which experts, and their weights in fp32.

    They are the top k of the softmax over all, normalised if the model says so.
    """
    config, name, op = layer.checkpoint.config, f"{layer.name}.choice", graph.op
    probabilities = op("Softmax", [graph.as_type(scores, dtype, _FLOAT, f"{name}.fp32")], f"{name}.softmax", axis=-1)
    k = graph.constant([config.experts_per_token])
    mix, chosen = graph.ops("TopK", [probabilities, k], name, [f"{name}.mix", f"{name}.experts"], axis=-1)
    if config.norm_topk_prob:
        mix = op("Div", [mix, op("ReduceSum", [mix, graph.constant([-1])], f"{name}.sum")], f"{name}.normalised")
    return chosen, mix


@dataclass(frozen=True)
class _Stack:
    """One matrix of all experts.

    16-bit numbers, or codes with scales and what else their scheme has.
    """

    stored: ir.Value
    scales: ir.Value | None = None
    zeros: ir.Value | None = None
    input_scales: ir.Value | None = None


def _stored(graph: GraphBuilder, layer: SparseLayer, part: str, dtype: ir.DataType) -> _Stack:
    """Write one matrix of all experts."""
    config, scheme, name = layer.checkpoint.config, layer.schemes[part], f"{layer.name}.{part}"
    rows, width = layer.shape(part)
    if scheme is None:
        kind = layer.checkpoint.entry(f"{layer.module(0, part)}.weight").dtype
        keep = ir.DataType.from_numpy(kind) if kind.itemsize == 2 and dtype == _FLOAT else dtype
        plain = (tensors[0].astype(keep.numpy()) for tensors in layer.read(part) if isinstance(tensors[0], np.ndarray))
        return _Stack(graph.weight_parts(f"{name}.weight", plain, keep, (config.num_experts, rows, width)))
    scales, zeros, inputs = list[NDArray](), list[NDArray](), list[float]()

    def codes(bits: int) -> Iterator[NDArray]:
        for (tensor,) in layer.read(part):
            assert isinstance(tensor, QuantizedTensor)
            scales.append(_by_row(tensor.scales32, scheme, rows).astype(dtype.numpy()))
            if tensor.zeros is not None:
                zeros.append(_by_row(tensor.zeros, scheme, rows))
            if tensor.input_scale is not None:
                inputs.append(tensor.input_scale)
            yield _packed(tensor.codes, bits)

    shape = (config.num_experts, rows, width * scheme.num_bits // 8)
    packed = graph.weight_parts(f"{name}.codes", codes(scheme.num_bits), ir.DataType.UINT8, shape)
    points = graph.weight(f"{name}.zeros", np.stack(zeros)) if zeros else None
    fixed = graph.weight(f"{name}.input_scales", np.array(inputs, np.float32)) if inputs else None
    return _Stack(packed, graph.weight(f"{name}.scales", np.stack(scales)), points, fixed)


def _by_row(values: NDArray, scheme: QuantScheme, rows: int) -> NDArray:
    """Scales or zero points `[rows, groups]`.

    Those that rows share are repeated for each of them.
    """
    return np.repeat(values, scheme.rows_per_scale(rows), axis=0)[:rows]


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Parts of a row on top of each other in its bytes."""
    per_byte = 8 // bits
    parts = codes.reshape(len(codes), per_byte, -1)
    packed = parts[:, 0].copy()
    for i in range(1, per_byte):
        packed |= parts[:, i] << np.uint8(i * bits)
    return packed


def _body(
    graph: GraphBuilder,
    layer: SparseLayer,
    outer: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    stacks: dict[str, _Stack],
    dtype: ir.DataType,
) -> ir.Graph:
    """What happens in one expert's turn.

    The sum so far goes in and comes out.
    """
    rows, chosen, mix, used = outer
    name, op, constant = f"{layer.name}.turn", graph.op, graph.constant
    hidden, (gate_part, up_part, down_part) = layer.checkpoint.config.hidden_size, layer.parts
    with graph.body(name, [("turn", _INT64, []), ("go_on", _BOOL, []), ("sum", _FLOAT, ["tokens", hidden])]) as body:
        turn, go_on, total = body.inputs
        expert = op("Gather", [used, turn], f"{name}.expert", axis=0)
        places = op("NonZero", [op("Equal", [chosen, expert], f"{name}.here")], f"{name}.places")
        tokens = op("Gather", [places, constant(0)], f"{name}.tokens", axis=0)
        own = op("Gather", [rows, tokens], f"{name}.rows", axis=0)
        weights = op("GatherND", [mix, op("Transpose", [places], f"{name}.pairs", perm=[1, 0])], f"{name}.weights")

        def linear(value: ir.Value, part: str) -> ir.Value:
            shape, scheme = layer.shape(part), layer.schemes[part]
            value = _rounded(graph, value, stacks[part], scheme, shape[1], expert, f"{name}.{part}", dtype)
            matrix = _matrix(graph, stacks[part], scheme, shape, expert, f"{name}.{part}", dtype)
            return op("Gemm", [value, matrix], f"{name}.{part}", transB=1)

        gate, up = linear(own, gate_part), linear(own, up_part)
        silu = op("Mul", [gate, op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        down = linear(op("Mul", [silu, up], f"{name}.glu"), down_part)
        column = op("Unsqueeze", [weights, constant([1])], f"{name}.column")
        weighed = op("Mul", [graph.as_type(down, dtype, _FLOAT, f"{name}.fp32"), column], f"{name}.weighed")
        at = op("Unsqueeze", [tokens, constant([1])], f"{name}.at")
        grown = op("ScatterND", [total, at, weighed], f"{name}.grown", reduction="add")
        body.result(op("Identity", [go_on], f"{name}.go_on"), _BOOL, [])
        body.result(grown, _FLOAT, ["tokens", hidden])
    return body.graph


def _matrix(
    graph: GraphBuilder,
    stack: _Stack,
    scheme: QuantScheme | None,
    shape: tuple[int, int],
    expert: ir.Value,
    name: str,
    dtype: ir.DataType,
) -> ir.Value:
    """One expert's matrix `[out, in]` in the type of activations."""
    op, constant = graph.op, graph.constant
    one = op("Gather", [stack.stored, expert], f"{name}.stored", axis=0)
    if scheme is None or stack.scales is None:
        return graph.as_type(one, stack.stored.dtype, dtype, f"{name}.cast")
    groups = constant([shape[0], scheme.num_groups(shape[1]), -1])
    if scheme.type == "float":
        places = op("Cast", [one], f"{name}.places", to=ir.DataType.INT32)
        values = op("Gather", [constant(_E4M3, dtype.numpy()), places], f"{name}.values", axis=0)
        centred = op("Reshape", [values, groups], f"{name}.groups")
    else:
        codes = _unpacked(graph, op("Cast", [one], f"{name}.bytes", to=dtype), scheme.num_bits, name, dtype)
        zero = constant(scheme.midpoint, dtype.numpy())
        if stack.zeros is not None:
            zero = op("Gather", [stack.zeros, expert], f"{name}.zero", axis=0)
            wide = op("Cast", [zero], f"{name}.zero.cast", to=dtype)
            zero = op("Unsqueeze", [wide, constant([2])], f"{name}.zero.column")
        centred = op("Sub", [op("Reshape", [codes, groups], f"{name}.groups"), zero], f"{name}.centred")
    own = op("Gather", [stack.scales, expert], f"{name}.scale", axis=0)
    matrix = op("Mul", [centred, op("Unsqueeze", [own, constant([2])], f"{name}.column")], f"{name}.scaled")
    return op("Reshape", [matrix, constant(shape)], f"{name}.matrix")


def _rounded(
    graph: GraphBuilder,
    x: ir.Value,
    stack: _Stack,
    scheme: QuantScheme | None,
    width: int,
    expert: ir.Value,
    name: str,
    dtype: ir.DataType,
) -> ir.Value:
    """Inputs `[tokens, in]` of one expert's matrix, rounded as its scheme says."""
    if scheme is None or scheme.activations is None:
        return x
    fixed = None
    if stack.input_scales is not None:
        fixed = graph.op("Gather", [stack.input_scales, expert], f"{name}.input_scale", axis=0)
    wide = graph.as_type(x, dtype, _FLOAT, f"{name}.fp32")
    rounded = qdq.rounded_rows(graph, wide, scheme, (0, width), fixed, name)
    return graph.as_type(rounded, _FLOAT, dtype, f"{name}.input.cast")


def _unpacked(graph: GraphBuilder, packed: ir.Value, bits: int, name: str, dtype: ir.DataType) -> ir.Value:
    """Bytes as numbers → codes as numbers, by exact divisions.

    OpenVINO computes shifts and masks of bytes wrongly inside of a loop.
    """
    op, base = graph.op, graph.constant(1 << bits, dtype.numpy())
    part, parts = graph.constant(1 / (1 << bits), dtype.numpy()), []
    for i in range(8 // bits - 1):
        above = op("Floor", [op("Mul", [packed, part], f"{name}.part.{i}")], f"{name}.above.{i}")
        below = op("Mul", [above, base], f"{name}.below.{i}")
        parts.append(op("Sub", [packed, below], f"{name}.code.{i}"))
        packed = above
    return op("Concat", [*parts, packed], f"{name}.codes", axis=1) if parts else packed
