"""The decoder in ai.onnx operators alone.

TensorRT parses them, and any ONNX runtime can run them.

    weight     INT4 [in, out], two per byte, low nibble first ─ DequantizeLinear(axis 0, blocks) ─ Reshape ─▶ MatMul
    embedding  INT4 or INT8 [vocab, in] ─ DequantizeLinear(axis 1, blocks) ─▶ Gather and, when tied, head;
               an untied 8-bit table is looked up first: no operator gathers INT4
    cache      Concat(past, new) outside of Attention, which has neither past nor present
    mask       query slot i may see slot j  ⇔  (j ≤ i and attention_mask[j]) or j = i

The mask counts slots of the cache, not positions, so it is right for left-padded batches too; the
diagonal keeps the rows of padding finite. The Reshape changes nothing: without it ONNX Runtime fuses both neighbours
into an operator that rounds activations to int8, so it is left away for TensorRT and at accuracy level 4.
Operators: the ONNX specification, opset 23 or 24; `ship.onnx.opset21` writes what opset 21 does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.core.tensorfile import StoredTensor
from qwen3_export.ship.onnx import dense_experts, opset21, qdq, rounded_products, routed, w8a8
from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

OPSET = 23
_INT64, _BOOL, _FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT


def supports(scheme: QuantScheme) -> str | None:
    """Why the operators of ai.onnx cannot hold a scheme, or None when they can."""
    if (scheme.type, scheme.num_bits) == ("float", 4):
        return f"{scheme.label} runs in no ONNX runtime on a CPU; `qwen3-export tensorrt` writes it for its own"
    return qdq.supports(scheme)


class StandardOps:
    """`ship.onnx.decoder.Flavor` for TensorRT and other runtimes of the ONNX standard.

    For `tensorrt`, inputs are rounded by Q/DQ pairs with constant scales; see `ship.onnx.rounded_products`.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        dtype: ir.DataType,
        accuracy_level: int = 0,
        tensorrt: bool = False,
        opset: int = OPSET,
    ) -> None:
        self.graph, self.dtype, self._tensorrt, self._old = graph, dtype, tensorrt, opset < OPSET
        self._fusable = tensorrt or accuracy_level > 0
        self._numpy, self._from_the_left = dtype.numpy(), False

    def prepare(self, config: Qwen3Config) -> None:
        """Inputs, the attention mask, and cos/sin of the given positions."""
        self._config = config
        self._ids = self.graph.input("input_ids", _INT64, ["batch_size", "sequence_length"])
        self._mask = self._attention_mask()
        positions = self.graph.input("position_ids", _INT64, ["batch_size", "sequence_length"])
        frequencies = config.rope.inverse_frequencies(config.head_dim)[None, None]
        op, constant = self.graph.op, self.graph.constant
        column = op("Unsqueeze", [op("Cast", [positions], "rope.fp32", to=_FLOAT), constant([2])], "rope.column")
        angles = op("Mul", [column, constant(frequencies, np.float32)], "rope.angles")
        self._cos, self._sin = (self._rope_table(kind, angles) for kind in ("Cos", "Sin"))

    def _rope_table(self, kind: str, angles: ir.Value) -> ir.Value:
        table, factor = self.graph.op(kind, [angles], f"rope.{kind}"), self._config.rope.attention_factor
        if factor != 1.0:
            table = self.graph.op("Mul", [table, self.graph.constant(factor, np.float32)], f"rope.{kind}.scaled")
        return self.graph.as_type(table, _FLOAT, self.dtype, f"rope.{kind}.cast")

    def _attention_mask(self) -> ir.Value:
        """Which slots each query may see, bool `[batch, 1, sequence, total]`."""
        op, constant = self.graph.op, self.graph.constant
        mask = self.graph.input("attention_mask", _INT64, ["batch_size", "total_sequence_length"])
        new, total = (
            op("Squeeze", [op("Shape", [value], f"mask.{name}.shape", start=1, end=2), constant([0])], f"mask.{name}")
            for value, name in ((self._ids, "new"), (mask, "total"))
        )
        slots = op("Range", [constant(0), total, constant(1)], "mask.slots")
        first = op("Sub", [total, new], "mask.first")
        queries = op("Range", [first, total, constant(1)], "mask.queries")
        row = op("Unsqueeze", [queries, constant([0, 1, 3])], "mask.row")
        column = op("Unsqueeze", [slots, constant([0, 1, 2])], "mask.column")
        present = op("Unsqueeze", [op("Cast", [mask], "mask.bool", to=_BOOL), constant([1, 2])], "mask.present")
        causal = op("And", [op("LessOrEqual", [column, row], "mask.past"), present], "mask.causal")
        return op("Or", [causal, op("Equal", [column, row], "mask.self")], "mask.allowed")

    def embedding(self, table: QuantizedTensor | StoredTensor) -> ir.Value:
        """Rows of the table."""
        if isinstance(table, QuantizedTensor):
            return self._looked_up(table)
        self._table = self.graph.float_weight(f"{EMBEDDING}.weight", table, self.dtype)
        rows = self.graph.op("Gather", [self._table, self._ids], "embedding", axis=0)
        return self.graph.as_type(rows, self._table.dtype, self.dtype, "embedding.cast")

    def _looked_up(self, table: QuantizedTensor) -> ir.Value:
        """A tied table is dequantized once for lookup and head.

        Its type is then that of activations.
        """
        scheme, width = table.scheme, table.shape[1]
        whole_rows = self._tensorrt and scheme.strategy == "channel"
        scales = table.scales[:, 0] if whole_rows else table.scales
        parts = [
            qdq.codes(self.graph, table.codes, scheme, f"{EMBEDDING}.codes"),
            self.graph.weight(f"{EMBEDDING}.scales", np.ascontiguousarray(scales.astype(self._numpy))),
        ]
        if table.zeros is not None:
            parts.append(qdq.codes(self.graph, table.zeros, scheme, f"{EMBEDDING}.zeros"))
        # TensorRT 1.7 crashes on 4 bits there, and stores them once as they are.
        self._from_the_left = self._tensorrt and scheme.num_bits == 8
        length, op = scheme.group_length(width), self.graph.op
        if scheme.num_bits == 8 and not self._config.tie_word_embeddings and not self._tensorrt:
            rows = [op("Gather", [part, self._ids], f"embedding.{i}", axis=0) for i, part in enumerate(parts)]
            return op("DequantizeLinear", rows, "embedding", axis=2, block_size=length)
        layout: dict[str, Any] = {"axis": 0} if whole_rows else {"axis": 1, "block_size": length}
        self._table = op("DequantizeLinear", parts, "embedding.dequantized", **layout)
        self._table.dtype = self.dtype
        return op("Gather", [self._table, self._ids], "embedding", axis=0)

    def norm(self, x: ir.Value, weight: NDArray, name: str) -> ir.Value:
        """RMSNorm, computed in fp32."""
        scale = self.graph.weight(f"{name}.weight", weight.astype(self._numpy))
        epsilon = self._config.rms_norm_eps
        if self._old:
            return opset21.rms_norm(self.graph, x, scale, epsilon, self.dtype, name)
        return self.graph.op("RMSNormalization", [x, scale], name, axis=-1, epsilon=epsilon, stash_type=1)

    def add_norm(self, h: ir.Value, delta: ir.Value, weight: NDArray, name: str) -> tuple[ir.Value, ir.Value]:
        """Sum and its norm."""
        total = self.graph.op("Add", [h, delta], f"{name}.sum")
        return total, self.norm(total, weight, name)

    def linear(self, x: ir.Value, weight: QuantizedTensor | StoredTensor, name: str) -> ir.Value:
        """`MatMul` with a plain or dequantized matrix `[in, out]`.

        Inputs are rounded where the scheme says so.
        """
        if isinstance(weight, QuantizedTensor):
            if w8a8.fits(weight.scheme) and not self._tensorrt:
                return w8a8.linear(self.graph, x, weight, self.dtype, name)
            if self._tensorrt:
                return rounded_products.product(self.graph, x, weight, self._matrix(weight, name), self.dtype, name)
            x = self._rounded_inputs(x, weight, name)
            return self.graph.op("MatMul", [x, self._matrix(weight, name)], name)
        stored = self.graph.float_weight(f"{name}.weight", weight.whole().T, self.dtype)
        return self.graph.op("MatMul", [x, self.graph.as_type(stored, stored.dtype, self.dtype, f"{name}.cast")], name)

    def _matrix(self, weight: QuantizedTensor, name: str) -> ir.Value:
        """The dequantized matrix `[in, out]`, see the module's docstring."""
        matrix = qdq.dequantized(self.graph, weight, self.dtype, name)
        if self._fusable or weight.scheme.type != "int":
            return matrix
        shape = self.graph.constant([weight.shape[1], weight.shape[0]])
        return self.graph.op("Reshape", [matrix, shape], f"{name}.matrix")

    def linears(
        self, x: ir.Value, weights: Mapping[str, QuantizedTensor | StoredTensor], name: str
    ) -> Sequence[ir.Value]:
        """One product each: what joins them is left to the runtime."""
        return [self.linear(x, weight, own) for own, weight in weights.items()]

    def _rounded_inputs(self, x: ir.Value, weight: QuantizedTensor, name: str) -> ir.Value:
        if weight.scheme.activations is None:
            return x
        rounded = qdq.rounded_inputs(
            self.graph, self.graph.as_type(x, self.dtype, _FLOAT, f"{name}.fp32"), weight, name
        )
        return self.graph.as_type(rounded, _FLOAT, self.dtype, f"{name}.input.cast")

    def attention(
        self, qkv: tuple[ir.Value, ir.Value, ir.Value], norms: tuple[NDArray, NDArray], layer: int
    ) -> ir.Value:
        """Head norms, RoPE, cache by Concat, then Attention with the explicit mask."""
        config, name, op = self._config, f"layer.{layer}.attention", self.graph.op
        q, k, v = (
            self._heads(value, heads, weight, f"{name}.{part}")
            for value, heads, weight, part in zip(
                qkv,
                (config.num_heads, config.num_kv_heads, config.num_kv_heads),
                (norms[0], norms[1], None),
                ("q", "k", "v"),
                strict=True,
            )
        )
        k, v = (self._extend(value, layer, kind) for value, kind in ((k, "key"), (v, "value")))
        if self._old:
            heads = (config.num_heads, config.num_kv_heads)
            mixed = opset21.attend(self.graph, (q, k, v), self._mask, heads, config.head_dim, self.dtype, name)
        else:
            scale = float(config.head_dim**-0.5)
            mixed = op("Attention", [q, k, v, self._mask], name, scale=scale, is_causal=0)
        flat = op("Transpose", [mixed], f"{name}.transposed", perm=[0, 2, 1, 3])
        width = config.num_heads * config.head_dim
        return op("Reshape", [flat, self.graph.constant([0, 0, width])], f"{name}.merged")

    def _heads(self, x: ir.Value, heads: int, weight: NDArray | None, name: str) -> ir.Value:
        """`[batch, heads, sequence, head_dim]`; q and k are normed and rotated."""
        op, shape = self.graph.op, self.graph.constant([0, 0, heads, self._config.head_dim])
        split = op("Reshape", [x, shape], f"{name}.split")
        if weight is not None:
            split = self.norm(split, weight, f"{name}_norm")
        turned = op("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])
        if weight is None:
            return turned
        if self._old:
            return opset21.rotate(self.graph, turned, self._cos, self._sin, f"{name}.rope")
        return op("RotaryEmbedding", [turned, self._cos, self._sin], f"{name}.rope", interleaved=0)

    def _extend(self, value: ir.Value, layer: int, kind: str) -> ir.Value:
        heads, head_dim = self._config.num_kv_heads, self._config.head_dim
        past = self.graph.input(
            f"past_key_values.{layer}.{kind}", self.dtype, ["batch_size", heads, "past_sequence_length", head_dim]
        )
        present = self.graph.op("Concat", [past, value], f"present.{layer}.{kind}", axis=2)
        shape: list[int | str] = ["batch_size", heads, "total_sequence_length", head_dim]
        self.graph.output(present, f"present.{layer}.{kind}", self.dtype, shape)
        return present

    def experts(self, x: ir.Value, layer: SparseLayer) -> ir.Value:
        """A loop over the chosen experts; for TensorRT, which takes none, all of them."""
        if self._tensorrt:
            return dense_experts.experts(self.graph, x, layer, self.dtype, self.linear)
        return routed.experts(self.graph, x, layer, self.dtype)

    def not_fused(self, layer: SparseLayer) -> str | None:
        """Why a layer's experts are no fused operator."""
        return "ai.onnx has no operator for experts"

    def head(self, x: ir.Value, table: QuantizedTensor | StoredTensor | None) -> ir.Value:
        """Logits in fp32; a tied head multiplies by the transposed embedding, stored once."""
        if isinstance(table, QuantizedTensor):
            logits = self.linear(x, table, HEAD)
            return self.graph.as_type(logits, self.dtype, _FLOAT, "head.fp32")
        stored = self._table if table is None else self.graph.float_weight(f"{HEAD}.weight", table, self.dtype)
        matrix = self.graph.as_type(stored, stored.dtype, self.dtype, "head.cast")
        if self._from_the_left and table is None:
            return self._head_from_the_left(x, matrix)
        turned = self.graph.op("Transpose", [matrix], "head.transposed", perm=[1, 0])
        logits = self.graph.op("MatMul", [x, turned], "head")
        return self.graph.as_type(logits, self.dtype, _FLOAT, "head.fp32")

    def _head_from_the_left(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """(W xᵀ)ᵀ: the table is not turned.

        TensorRT stores a table of 8 bits a second time where it is.
        """
        op = self.graph.op
        column = op("Transpose", [x], "head.columns", perm=[0, 2, 1])
        logits = op("Transpose", [op("MatMul", [matrix, column], "head")], "head.rows", perm=[0, 2, 1])
        return self.graph.as_type(logits, self.dtype, _FLOAT, "head.fp32")
