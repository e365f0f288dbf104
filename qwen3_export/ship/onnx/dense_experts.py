"""Experts without choices: every expert computes every token.

Weights of zero take most of it away.

    router ─ Softmax ─ TopK ─▶ which, mix [tokens, k] ─ one-hot ─▶ weights [tokens, experts], zero where not chosen
    Σ over experts: weight · down(silu(gate x) · up x)

The numbers are those of a loop over the chosen experts. TensorRT takes no such loop, and takes this; the work is that
of all experts, so it is for a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.qmoe import router_scores
from qwen3_export.ship.onnx.routed import chosen_experts

# Beyond it a token costs more than it is worth, and a graph has thousands of products.
MOST_EXPERTS = 16
_FLOAT = ir.DataType.FLOAT
# `StandardOps.linear`: a product with a stored matrix.
Linear = Callable[[ir.Value, Any, str], ir.Value]


def experts(graph: GraphBuilder, x: ir.Value, layer: SparseLayer, dtype: ir.DataType, linear: Linear) -> ir.Value:
    """The weighed sum of all experts' outputs.

    It has the shape of `x`, `[batch, sequence, hidden]`.
    """
    name, op, constant = layer.name, graph.op, graph.constant
    # Three axes, as every other product has: groups of inputs are cut from the last one.
    rows = op("Reshape", [x, constant([1, -1, layer.checkpoint.config.hidden_size])], f"{name}.rows")
    weights = _weights(graph, x, layer, dtype)
    total: ir.Value | None = None
    gate_part, up_part, down_part = layer.parts
    for number in range(layer.checkpoint.config.num_experts):
        own = f"{name}.{number}"
        gate, up, down = (layer.checkpoint.matrix(layer.module(number, part)) for part in layer.parts)
        opened, value = linear(rows, gate, f"{own}.{gate_part}"), linear(rows, up, f"{own}.{up_part}")
        silu = op("Mul", [opened, op("Sigmoid", [opened], f"{own}.sigmoid")], f"{own}.silu")
        out = linear(op("Mul", [silu, value], f"{own}.glu"), down, f"{own}.{down_part}")
        share = op("Gather", [weights, constant([number])], f"{own}.share", axis=1)
        weighed = op("Mul", [graph.as_type(out, dtype, _FLOAT, f"{own}.fp32"), share], f"{own}.weighed")
        total = weighed if total is None else op("Add", [total, weighed], f"{own}.sum")
    assert total is not None
    summed = graph.as_type(total, _FLOAT, dtype, f"{name}.sum")
    return op("Reshape", [summed, op("Shape", [x], f"{name}.shape")], f"{name}.out")


def _weights(graph: GraphBuilder, x: ir.Value, layer: SparseLayer, dtype: ir.DataType) -> ir.Value:
    """Each expert's weight for each token, fp32 `[tokens, experts]`."""
    name, op, constant = f"{layer.name}.weights", graph.op, graph.constant
    chosen, mix = chosen_experts(graph, router_scores(graph, x, layer, dtype), layer, dtype)
    numbers: Sequence[int] = range(layer.checkpoint.config.num_experts)
    here = op("Equal", [op("Unsqueeze", [chosen, constant([2])], f"{name}.chosen"), constant(numbers)], f"{name}.here")
    shares = op("Unsqueeze", [mix, constant([2])], f"{name}.mix")
    spread = op("Mul", [op("Cast", [here], f"{name}.hot", to=_FLOAT), shares], f"{name}.spread")
    return op("ReduceSum", [spread, constant([1])], name, keepdims=0)
