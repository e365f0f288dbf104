"""The decoder in ONNX Runtime's fused operators (`com.microsoft`).

    MatMulInteger    int8 weights beside int8 inputs, see `ship.onnx.w8a8`
    MatMulNBits      see `ship.onnx.nbits`
    GatherBlockQuantized  the same codes and scales as `[vocab, in·bits/8]` and `[vocab, groups]`: a tied
                     table is stored once, and reshaped for the lookup
    GroupQueryAttention   q [b, s, heads·d], past and present [b, kv_heads, length, d]
    RotaryEmbedding       half-split pairs; cos and sin of the given positions alone, [b·s, d/2]
    SkipSimplifiedLayerNormalization   residual add and RMSNorm in one

`ship.onnx.padding` says how a batch with padding reaches GroupQueryAttention.

Operator definitions: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, join_rows
from qwen3_export.core.tensorfile import StoredTensor
from qwen3_export.ship.onnx import nbits, qmoe, routed, w8a8
from qwen3_export.ship.onnx.cache import FloatCache, QuantizedCache
from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import CONTRIB, GraphBuilder
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.padding import TokenOrder

OPSET = 21
_INT64, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def supports(scheme: QuantScheme) -> str | None:
    """Why neither `MatMulNBits` nor `MatMulInteger` holds a scheme, or None when one does."""
    return None if w8a8.fits(scheme) else nbits.supports(scheme)


class OrtOps:
    """`ship.onnx.decoder.Flavor` for plain ONNX Runtime and onnxruntime-genai.

    `accuracy_level` of `MatMulNBits`: 0 multiplies with activations as they are, 4 with activations rounded to
    int8. Level 0 with other than 4 bits expands the whole matrix at every call. `provider`: whose QMoE experts are for.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        dtype: ir.DataType,
        accuracy_level: int,
        cache: QuantizedCache | None = None,
        provider: str = "cpu",
    ) -> None:
        self.graph, self.dtype, self.accuracy_level, self._cache = graph, dtype, accuracy_level, cache
        self._provider = provider
        self._numpy = dtype.numpy()

    def prepare(self, config: Qwen3Config) -> None:
        """Inputs, the tokens in the order of the cache, and cos and sin."""
        graph, self._config = self.graph, config
        ids = graph.input("input_ids", _INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", _INT64, ["batch_size", "total_sequence_length"])
        positions = graph.input("position_ids", _INT64, ["batch_size", "sequence_length"])
        self._order = TokenOrder(graph, ids, mask)
        self._ids = self._order.tokens_first(ids, "embedding.ids")
        self._rope_tables(self._order.tokens_first(positions, "rope.positions"))

    def _rope_tables(self, positions: ir.Value) -> None:
        """Cos and sin `[b·s, d/2]`, and each token's row in them, `[b, s]`.

        They are made once a call in fp32.
        """
        op, constant, rope = self.graph.op, self.graph.constant, self._config.rope
        column = op("Reshape", [op("Cast", [positions], "rope.fp32", to=_FLOAT), constant([-1, 1])], "rope.column")
        frequencies = constant(rope.inverse_frequencies(self._config.head_dim)[None], np.float32)
        angles = op("Mul", [column, frequencies], "rope.angles")
        tables = []
        for kind in ("Cos", "Sin"):
            table = op(kind, [angles], f"rope.{kind}")
            if rope.attention_factor != 1.0:
                table = op("Mul", [table, constant(rope.attention_factor, np.float32)], f"rope.{kind}.scaled")
            tables.append(self.graph.as_type(table, _FLOAT, self.dtype, f"rope.{kind}.cast"))
        self._cos, self._sin = tables
        count = op("Size", [positions], "rope.count")
        rows = op("Range", [constant(0), count, constant(1)], "rope.range")
        self._positions = op("Reshape", [rows, op("Shape", [positions], "rope.shape")], "rope.rows")

    def embedding(self, table: QuantizedTensor | StoredTensor) -> ir.Value:
        """Rows of the table in its stored type, then cast.

        That is half the size of an fp32 table, and exact.
        """
        self._tied = table if isinstance(table, QuantizedTensor) else None
        if isinstance(table, QuantizedTensor):
            return self._looked_up(table)
        self._table = self.graph.float_weight(f"{EMBEDDING}.weight", table, self.dtype)
        rows = self.graph.op("Gather", [self._table, self._ids], "embedding", axis=0)
        return self.graph.as_type(rows, self._table.dtype, self.dtype, "embedding.cast")

    def _looked_up(self, table: QuantizedTensor) -> ir.Value:
        scheme, width = table.scheme, table.shape[1]
        codes, *rest = self._stored([table], EMBEDDING)
        flat = self.graph.constant([table.shape[0], width * scheme.num_bits // 8])
        rows = self.graph.op("Reshape", [codes, flat], "embedding.codes")
        return self.graph.op(
            "GatherBlockQuantized",
            [rows, self._ids, *rest],
            "embedding",
            CONTRIB,
            bits=scheme.num_bits,
            block_size=nbits.block_size(scheme, width),
            gather_axis=0,
            quantize_axis=1,
        )

    def norm(self, x: ir.Value, weight: NDArray, name: str) -> ir.Value:
        """RMSNorm."""
        scale = self.graph.weight(f"{name}.weight", weight.astype(self._numpy))
        epsilon = self._config.rms_norm_eps
        return self.graph.op("SimplifiedLayerNormalization", [x, scale], name, axis=-1, epsilon=epsilon, stash_type=1)

    def add_norm(self, h: ir.Value, delta: ir.Value, weight: NDArray, name: str) -> tuple[ir.Value, ir.Value]:
        """Sum and norm in one operator; the sum is its fourth output."""
        scale = self.graph.weight(f"{name}.weight", weight.astype(self._numpy))
        outputs = self.graph.ops(
            "SkipSimplifiedLayerNormalization",
            [h, delta, scale],
            name,
            [name, "", "", f"{name}.sum"],
            CONTRIB,
            epsilon=self._config.rms_norm_eps,
        )
        return outputs[3], outputs[0]

    def linear(self, x: ir.Value, weight: QuantizedTensor | StoredTensor, name: str) -> ir.Value:
        """`MatMulNBits` or, beside int8 inputs, `MatMulInteger` for codes; a plain product for 16-bit weights.

        On a CPU `FusedMatMul` takes them as the source stores them, `[out, in]`: turning them was a fifth of an export.
        """
        if isinstance(weight, QuantizedTensor) and w8a8.fits(weight.scheme):
            return w8a8.linear(self.graph, x, weight, self.dtype, name)
        if isinstance(weight, QuantizedTensor):
            return self._quantized(x, [weight], self._stored([weight], name), name)
        as_stored = (self._provider, self.dtype) == ("cpu", _FLOAT)
        stored = self.graph.float_weight(f"{name}.weight", weight if as_stored else weight.whole().T, self.dtype)
        matrix = self.graph.as_type(stored, stored.dtype, self.dtype, f"{name}.cast")
        if as_stored:
            return self.graph.op("FusedMatMul", [x, matrix], name, CONTRIB, transB=1)
        return self.graph.op("MatMul", [x, matrix], name)

    def linears(
        self, x: ir.Value, weights: Mapping[str, QuantizedTensor | StoredTensor], name: str
    ) -> Sequence[ir.Value]:
        """One `MatMulNBits` or `MatMulInteger` for linears of one scheme, and a Split behind it.

        It has the rows of all of them, and rounds their inputs once.

        Threads wait for each other once, not twice or three times: a token of 8 layers at the width of 0.6B took 42 ms
        so, 46 with q, k and v joined alone, 54 with none (two threads on a busy machine, the same turns).
        """
        found = list(weights.values())
        tensors = [w for w in found if isinstance(w, QuantizedTensor) and (not w8a8.fits(w.scheme) or w8a8.joins(w))]
        if len(tensors) < len(found) or len({tensor.scheme for tensor in tensors}) > 1:
            return [self.linear(x, weight, own) for own, weight in weights.items()]
        if w8a8.fits(tensors[0].scheme):
            product = w8a8.linear(self.graph, x, join_rows(tensors), self.dtype, name)
        else:
            product = self._quantized(x, tensors, self._stored(tensors, name), name)
        sizes = self.graph.constant([tensor.shape[0] for tensor in tensors])
        return self.graph.ops("Split", [product, sizes], f"{name}.split", list(weights), axis=-1)

    def _stored(self, weights: Sequence[QuantizedTensor], name: str) -> list[ir.Value]:
        return nbits.stored(self.graph, weights, name, self.dtype)

    def _quantized(
        self, x: ir.Value, weights: Sequence[QuantizedTensor], stored: list[ir.Value], name: str
    ) -> ir.Value:
        return nbits.product(self.graph, x, weights, stored, name, self.accuracy_level)

    def attention(
        self, qkv: tuple[ir.Value, ir.Value, ir.Value], norms: tuple[NDArray, NDArray], layer: int
    ) -> ir.Value:
        """Norm and rotate q and k, then grouped-query attention.

        The operator also appends to the cache.
        """
        config, name = self._config, f"layer.{layer}.attention"
        q = self._rotate(self._head_norm(qkv[0], norms[0], config.num_heads, f"{name}.q_norm"), f"{name}.q_rope")
        k = self._rotate(self._head_norm(qkv[1], norms[1], config.num_kv_heads, f"{name}.k_norm"), f"{name}.k_rope")
        kept = FloatCache(self.dtype) if self._cache is None else self._cache
        shapes: list[list[int | str]] = [
            ["batch_size", config.num_kv_heads, f"{when}_sequence_length", kept.width(config.head_dim)]
            for when in _WHEN
        ]
        past = [self.graph.input(f"past_key_values.{layer}.{kind}", kept.dtype, shapes[0]) for kind in _KINDS]
        outputs = self.graph.ops(
            "GroupQueryAttention",
            [q, k, qkv[2], *past, self._order.lengths, self._order.total, *kept.inputs(self.graph, layer)],
            name,
            [name, f"{name}.key", f"{name}.value"],
            CONTRIB,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=float(config.head_dim**-0.5),
            do_rotary=0,
            **kept.attributes,
        )
        for kind, value in zip(_KINDS, outputs[1:], strict=True):
            self.graph.output(value, f"present.{layer}.{kind}", kept.dtype, shapes[1])
        return outputs[0]

    def _head_norm(self, x: ir.Value, weight: NDArray, heads: int, name: str) -> ir.Value:
        head_dim, constant = self._config.head_dim, self.graph.constant
        split = self.graph.op("Reshape", [x, constant([0, 0, heads, head_dim])], f"{name}.split")
        normed = self.norm(split, weight, name)
        return self.graph.op("Reshape", [normed, constant([0, 0, heads * head_dim])], f"{name}.merge")

    def _rotate(self, x: ir.Value, name: str) -> ir.Value:
        inputs = [x, self._positions, self._cos, self._sin]
        return self.graph.op("RotaryEmbedding", inputs, name, CONTRIB, interleaved=0)

    def experts(self, x: ir.Value, layer: SparseLayer) -> ir.Value:
        """QMoE, or a loop over the chosen experts.

        QMoE serves where it computes what the accuracy level promises.
        """
        if self.not_fused(layer):
            return routed.experts(self.graph, x, layer, self.dtype)
        return qmoe.experts(self.graph, x, layer, self.accuracy_level, self.dtype, self._provider)

    def not_fused(self, layer: SparseLayer) -> str | None:
        """Why a layer's experts are no QMoE, or None when they are."""
        if self._provider == "cuda" and self.dtype == _FLOAT:
            return "QMoE on CUDA has 16-bit activations"
        return qmoe.cannot_hold(layer, self.accuracy_level, self._provider)

    def head(self, x: ir.Value, table: QuantizedTensor | StoredTensor | None) -> ir.Value:
        """Logits; a tied head multiplies by the one stored embedding table."""
        weight, name = (self._tied, EMBEDDING) if table is None else (table, HEAD)
        x = self._order.as_given(x, "head.order")
        if isinstance(weight, QuantizedTensor) and w8a8.fits(weight.scheme):
            logits = w8a8.linear(self.graph, x, weight, self.dtype, "head")
        elif isinstance(weight, QuantizedTensor):
            logits = self._quantized(x, [weight], self._stored([weight], name), "head")
        else:
            stored = self._table if weight is None else self.graph.float_weight(f"{HEAD}.weight", weight, self.dtype)
            matrix = self.graph.as_type(stored, stored.dtype, self.dtype, "head.cast")
            logits = self.graph.op("FusedMatMul", [x, matrix], "head", CONTRIB, transB=1)
        return self.graph.as_type(logits, self.dtype, ir.DataType.FLOAT, "head.fp32")


_KINDS = ("key", "value")
_WHEN = ("past", "total")
