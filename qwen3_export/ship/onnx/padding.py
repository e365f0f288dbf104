"""Batches with padding, each row's tokens first in its cache.

    attention_mask    0 0 1 1 | 1      1 1 0 0 | 1      ones are tokens, the part behind the bar is new
    cache             t t t . .        t t t . .        both rows: tokens without gaps, from slot 0

GroupQueryAttention takes one number per row: how many slots are full after the call. So the new tokens of a row are
moved before its padding, only tokens are counted, and hidden states are moved back before the head. Keys and values of
padding lie behind the tokens, where the next call overwrites them. A mask of ones that ends earlier (`1 1 1 0`) with
one new token per row is accepted too.
"""

from __future__ import annotations

from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir

_INT32 = ir.DataType.INT32


class TokenOrder:
    """The order of a batch's new tokens: each row's tokens before its padding.

    `lengths` int32 `[b]` and `total` int32 are inputs of the attention.
    """

    def __init__(self, graph: GraphBuilder, ids: ir.Value, mask: ir.Value) -> None:
        self._graph = graph
        op, constant = graph.op, graph.constant
        new = op("Shape", [ids], "mask.new", start=1, end=2)
        total = op("Shape", [mask], "mask.total", start=1, end=2)
        first = op("Sub", [total, new], "mask.first")
        added = op("Slice", [mask, first, total, constant([1])], "mask.added")
        # Sort keys: tokens keep their order, since earlier ones have greater keys; padding has negative ones.
        slots = op("Range", [constant(0), op("Squeeze", [new], "mask.count"), constant(1)], "mask.slots")
        keys = op("Sub", [op("Mul", [added, new], "mask.weighted"), slots], "mask.keys")
        self._order = graph.ops("TopK", [keys, new], "mask.order", ["mask.sorted", "mask.order"], axis=1)[1]
        place = op("Sub", [op("CumSum", [added, constant(1)], "mask.tokens"), constant(1)], "mask.place")
        back = op("Max", [place, constant(0)], "mask.back")
        self._back = op("Unsqueeze", [back, constant([2])], "mask.back.rows")
        self.lengths = op("Cast", [self._last_slot(mask, added, new)], "mask.lengths", to=_INT32)
        self.total = op("Cast", [op("Squeeze", [total], "mask.all")], "mask.total32", to=_INT32)

    def _last_slot(self, mask: ir.Value, added: ir.Value, new: ir.Value) -> ir.Value:
        """The last slot that each row fills in this call, `[b]`, padding included."""
        op, constant, axis = self._graph.op, self._graph.constant, self._graph.constant([1])
        count = op("ReduceSum", [mask, axis], "mask.ones", keepdims=0)
        padding = op("Sub", [new, op("ReduceSum", [added, axis], "mask.added.ones", keepdims=0)], "mask.padding")
        # If the mask starts with ones, a single new token counts as a token even where the ones end earlier.
        starts = op("Gather", [mask, constant(0)], "mask.starts", axis=1)
        several = op("Min", [op("Sub", [new, constant(1)], "mask.others"), constant(1)], "mask.several")
        counted = op("Max", [several, op("Sub", [constant(1), starts], "mask.left")], "mask.counted")
        padding = op("Mul", [padding, counted], "mask.padding.counted")
        return op("Sub", [op("Add", [count, padding], "mask.filled"), constant(1)], "mask.last")

    def tokens_first(self, values: ir.Value, name: str) -> ir.Value:
        """Values `[b, s]` of the new tokens, tokens before padding."""
        return self._graph.op("GatherElements", [values, self._order], name, axis=1)

    def as_given(self, hidden: ir.Value, name: str) -> ir.Value:
        """Hidden states `[b, s, hidden]` in the order of `input_ids` again.

        Positions of padding get the values of some token.
        """
        return self._graph.op("GatherND", [hidden, self._back], name, batch_dims=1)
