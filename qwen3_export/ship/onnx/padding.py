"""Batches with padding, each row's tokens first in its cache.

    attention_mask    0 0 1 1 | 1      1 1 0 0 | 1      ones are tokens, the part behind the bar is new
    cache             t t t . .        t t t . .        both rows: tokens without gaps, from slot 0

GroupQueryAttention knows one number a row, how many slots are full after the call. So the new tokens of a row
are moved before its padding when they come in, the row counts its tokens alone, and hidden states move back
before the head. What padding leaves behind the tokens is overwritten by the next call. One new token a row
with a mask of ones that end earlier (`1 1 1 0`, ones counted) is understood as well.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen3_export.ship.onnx.graph import GraphBuilder

_INT32 = ir.DataType.INT32


class TokenOrder:
    """Each row's new tokens before its padding.

    `lengths` int32 `[b]` and `total` int32 are the attention's.
    """

    def __init__(self, graph: GraphBuilder, ids: ir.Value, mask: ir.Value) -> None:
        self._graph = graph
        op, constant = graph.op, graph.constant
        new = op("Shape", [ids], "mask.new", start=1, end=2)
        total = op("Shape", [mask], "mask.total", start=1, end=2)
        first = op("Sub", [total, new], "mask.first")
        added = op("Slice", [mask, first, total, constant([1])], "mask.added")
        # Tokens keep their order: earlier ones have the greater key, padding a negative one.
        slots = op("Range", [constant(0), op("Squeeze", [new], "mask.count"), constant(1)], "mask.slots")
        keys = op("Sub", [op("Mul", [added, new], "mask.weighted"), slots], "mask.keys")
        self._order = graph.ops("TopK", [keys, new], "mask.order", ["mask.sorted", "mask.order"], axis=1)[1]
        place = op("Sub", [op("CumSum", [added, constant(1)], "mask.tokens"), constant(1)], "mask.place")
        back = op("Max", [place, constant(0)], "mask.back")
        self._back = op("Unsqueeze", [back, constant([2])], "mask.back.rows")
        self.lengths = op("Cast", [self._last_slot(mask, added, new)], "mask.lengths", to=_INT32)
        self.total = op("Cast", [op("Squeeze", [total], "mask.all")], "mask.total32", to=_INT32)

    def _last_slot(self, mask: ir.Value, added: ir.Value, new: ir.Value) -> ir.Value:
        """The last slot that a row fills in this call, `[b]`.

        The padding behind its new tokens is counted.
        """
        op, constant, axis = self._graph.op, self._graph.constant, self._graph.constant([1])
        count = op("ReduceSum", [mask, axis], "mask.ones", keepdims=0)
        padding = op("Sub", [new, op("ReduceSum", [added, axis], "mask.added.ones", keepdims=0)], "mask.padding")
        # A single new token behind a mask that starts with ones is a token, wherever the ones end.
        starts = op("Gather", [mask, constant(0)], "mask.starts", axis=1)
        several = op("Min", [op("Sub", [new, constant(1)], "mask.others"), constant(1)], "mask.several")
        counted = op("Max", [several, op("Sub", [constant(1), starts], "mask.left")], "mask.counted")
        padding = op("Mul", [padding, counted], "mask.padding.counted")
        return op("Sub", [op("Add", [count, padding], "mask.filled"), constant(1)], "mask.last")

    def tokens_first(self, values: ir.Value, name: str) -> ir.Value:
        """`[b, s]` of the new tokens in the order of the cache."""
        return self._graph.op("GatherElements", [values, self._order], name, axis=1)

    def as_given(self, hidden: ir.Value, name: str) -> ir.Value:
        """`[b, s, hidden]` in the order of `input_ids` again.

        A row of padding gets some token's values.
        """
        return self._graph.op("GatherND", [hidden, self._back], name, batch_dims=1)
