"""RMSNormalization, RotaryEmbedding and Attention of opset 23, written in operators of opset 21.

They are for runtimes without newer operators, and compute what the ONNX specification's function bodies say.
"""

from __future__ import annotations

import numpy as np

from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

_FLOAT = ir.DataType.FLOAT


def rms_norm(
    graph: GraphBuilder, x: ir.Value, scale: ir.Value, epsilon: float, dtype: ir.DataType, name: str
) -> ir.Value:
    """RMSNorm over the last axis, `x / sqrt(mean(x²) + epsilon) · scale`.

    The quotient is in fp32.
    """
    op, constant = graph.op, graph.constant
    wide = graph.as_type(x, dtype, _FLOAT, f"{name}.fp32")
    mean = op("ReduceMean", [op("Mul", [wide, wide], f"{name}.squares"), constant([-1])], f"{name}.mean", keepdims=1)
    root = op("Sqrt", [op("Add", [mean, constant(epsilon, np.float32)], f"{name}.moved")], f"{name}.root")
    normed = graph.as_type(op("Div", [wide, root], f"{name}.quotient"), _FLOAT, dtype, f"{name}.cast")
    return op("Mul", [normed, scale], name)


def rotate(graph: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, name: str) -> ir.Value:
    """Rotary embedding of `[batch, heads, sequence, d]`, pairs (i, i + d/2).

    `cos` and `sin` are `[batch, sequence, d/2]`.
    """
    op, heads = graph.op, graph.constant([1])
    first, second = graph.ops("Split", [x], name, [f"{name}.first", f"{name}.second"], axis=-1, num_outputs=2)
    c, s = op("Unsqueeze", [cos, heads], f"{name}.cos"), op("Unsqueeze", [sin, heads], f"{name}.sin")
    a, b = op("Mul", [first, c], f"{name}.first.cos"), op("Mul", [second, s], f"{name}.second.sin")
    d, e = op("Mul", [second, c], f"{name}.second.cos"), op("Mul", [first, s], f"{name}.first.sin")
    parts = [op("Sub", [a, b], f"{name}.turned.first"), op("Add", [d, e], f"{name}.turned.second")]
    return op("Concat", parts, f"{name}.turned", axis=-1)


def attend(
    graph: GraphBuilder,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    mask: ir.Value,
    heads: tuple[int, int],
    head_dim: int,
    dtype: ir.DataType,
    name: str,
) -> ir.Value:
    """Grouped-query attention `[batch, heads, sequence, d]`; `mask` bool `[batch, 1, sequence, total]`."""
    op, constant, (count, shared) = graph.op, graph.constant, heads
    q, k, v = qkv
    # The query heads of one key/value head have an axis of their own, along which k and v are broadcast.
    grouped = op("Reshape", [q, constant([0, shared, count // shared, -1, head_dim])], f"{name}.q.groups")
    k, v = (op("Unsqueeze", [value, constant([2])], f"{name}.{part}.groups") for value, part in ((k, "k"), (v, "v")))
    turned = op("Transpose", [k], f"{name}.k.turned", perm=[0, 1, 2, 4, 3])
    scaled = op("Mul", [grouped, constant(head_dim**-0.5, dtype.numpy())], f"{name}.q.scaled")
    scores = op("MatMul", [scaled, turned], f"{name}.scores")
    allowed = op("Unsqueeze", [mask, constant([1])], f"{name}.allowed")
    lowest = constant(_lowest(dtype), dtype.numpy())
    weights = op("Softmax", [op("Where", [allowed, scores, lowest], f"{name}.masked")], f"{name}.weights", axis=-1)
    mixed = op("MatMul", [weights, v], f"{name}.mixed")
    return op("Reshape", [mixed, constant([0, count, -1, head_dim])], name)


def _lowest(dtype: ir.DataType) -> float:
    """A finite number that becomes zero in a softmax."""
    return -6e4 if dtype == ir.DataType.FLOAT16 else -1e30
