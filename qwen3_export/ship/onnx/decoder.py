"""The Qwen3 decoder as a graph, independent of a runtime's operators.

    input_ids ─ embedding ─▶ h ─ [ norm ─ q,k,v ─ head norm ─ rope ─ attention ─ o ─ + h
                                   norm ─ gate,up ─ silu·up ─ down, or experts ─ + h ] × layers ─ norm ─ head ─▶ logits

A flavor (`onnx.ort_ops`, `onnx.standard_ops`) says how a norm, a linear, RoPE and attention are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config, block_name
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.core.tensorfile import StoredTensor
from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir


class Flavor(Protocol):
    """The decoder's parts in the operators of one family of runtimes.

    `dtype` is the type of activations.
    """

    graph: GraphBuilder
    dtype: ir.DataType

    def prepare(self, config: Qwen3Config) -> None:
        """Declare inputs and what all layers share (mask, rope tables)."""

    def embedding(self, table: QuantizedTensor | StoredTensor) -> ir.Value:
        """Hidden states of `input_ids`."""

    def norm(self, x: ir.Value, weight: NDArray, name: str) -> ir.Value:
        """RMSNorm over the last axis."""

    def add_norm(self, h: ir.Value, delta: ir.Value, weight: NDArray, name: str) -> tuple[ir.Value, ir.Value]:
        """`h + delta` and its RMSNorm."""

    def linear(self, x: ir.Value, weight: QuantizedTensor | StoredTensor, name: str) -> ir.Value:
        """`x @ weight.T` for a weight `[out, in]`."""

    def linears(
        self, x: ir.Value, weights: Mapping[str, QuantizedTensor | StoredTensor], name: str
    ) -> Sequence[ir.Value]:
        """Linears of the same inputs by name, as one product where faster."""

    def attention(
        self, qkv: tuple[ir.Value, ir.Value, ir.Value], norms: tuple[NDArray, NDArray], layer: int
    ) -> ir.Value:
        """Head norms, RoPE, cache and attention: `[batch, sequence, heads * head_dim]`."""

    def experts(self, x: ir.Value, layer: SparseLayer) -> ir.Value:
        """The MLP of a sparse layer: router, and the sum of the chosen experts."""

    def head(self, x: ir.Value, table: QuantizedTensor | StoredTensor | None) -> ir.Value:
        """Logits in fp32.

        `table` None when the head is the embedding, which is stored once.
        """


def build_decoder(flavor: Flavor, checkpoint: Checkpoint, progress: Progress) -> None:
    """Write the whole decoder into the flavor's graph, reading one tensor at a time."""
    config, graph = checkpoint.config, flavor.graph
    flavor.prepare(config)
    h = flavor.embedding(checkpoint.matrix(EMBEDDING))
    delta: ir.Value | None = None
    with progress.bar(f"export layers of {graph.folder.name.removesuffix('.partial')}", config.num_layers) as tick:
        for layer in range(config.num_layers):
            h, delta = _block(flavor, checkpoint, layer, h, delta)
            tick()
    assert delta is not None
    _, x = flavor.add_norm(h, delta, _weight(checkpoint, "model.norm"), "norm")
    table = None if config.tie_word_embeddings else checkpoint.matrix(HEAD)
    logits = flavor.head(x, table)
    graph.output(logits, "logits", ir.DataType.FLOAT, ["batch_size", "sequence_length", config.vocab_size])
    # `logits` is computed last but declared as the first output, as every consumer expects.
    graph.outputs.insert(0, graph.outputs.pop())


def _block(
    flavor: Flavor, checkpoint: Checkpoint, layer: int, h: ir.Value, delta: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """One decoder block.

    Returns the residual stream, and the MLP's output that is still to be added to it.
    """
    prefix, short = block_name(layer), f"layer.{layer}"

    def linear(name: str, x: ir.Value) -> ir.Value:
        return flavor.linear(x, checkpoint.matrix(f"{prefix}.{name}"), f"{short}.{name}")

    def linears(names: Sequence[str], x: ir.Value, together: str) -> Sequence[ir.Value]:
        weights = {f"{short}.{name}": checkpoint.matrix(f"{prefix}.{name}") for name in names}
        return flavor.linears(x, weights, f"{short}.{together}")

    inputs, output, gated, down = checkpoint.config.block(layer).stages
    weight = _weight(checkpoint, f"{prefix}.{inputs.norm}")
    if delta is None:
        x = flavor.norm(h, weight, f"{short}.input_norm")
    else:
        h, x = flavor.add_norm(h, delta, weight, f"{short}.input_norm")
    q, k, v = linears(inputs.names, x, "self_attn.qkv_proj")
    norms = (_weight(checkpoint, f"{prefix}.self_attn.q_norm"), _weight(checkpoint, f"{prefix}.self_attn.k_norm"))
    mixed = linear(output.names[0], flavor.attention((q, k, v), norms, layer))
    h, x = flavor.add_norm(h, mixed, _weight(checkpoint, f"{prefix}.{gated.norm}"), f"{short}.post_norm")
    if gated.routed:
        return h, flavor.experts(x, SparseLayer(checkpoint, layer))
    gate, up = linears(gated.names, x, "mlp.gate_up_proj")
    graph = flavor.graph
    silu = graph.op("Mul", [gate, graph.op("Sigmoid", [gate], f"{short}.sigmoid")], f"{short}.silu")
    return h, linear(down.names[0], graph.op("Mul", [silu, up], f"{short}.glu"))


def _weight(checkpoint: Checkpoint, module: str) -> NDArray[np.float32]:
    return checkpoint.read(f"{module}.weight").astype(np.float32)
