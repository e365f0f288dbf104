"""The embedding and the output head, read in fp32 by rows.

Each is one matrix `[vocab, hidden]`, in 16 bits or codes.

    embedding   rows of token ids       table.rows(ids)      [n, hidden]
    head        hidden states times it  table.logits(x)      [n, vocab]

A tied model has one table for both. In a small model it is most of the weights, so it is dequantized piece by piece
unless `expand` asks for the whole in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.model.activations import rounder

_ROWS_AT_ONCE = 16384
# Numbers of a table that is kept in fp32: 128 MiB.
_SMALL = 1 << 25


def to_torch(array: NDArray) -> Tensor:
    """A numpy array as a tensor of the same type, bf16 included."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> NDArray:
    """A CPU tensor as a numpy array of the same type, bf16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Table:
    """An embedding or head `[vocab, hidden]`.

    `expand` dequantizes all codes at once, and keeps the numbers of a small table in fp32, which saves a conversion at
    every decoded token.
    """

    def __init__(self, stored: QuantizedTensor | NDArray, expand: bool = False) -> None:
        self._round: Callable[[Tensor], Tensor] | None = None
        if isinstance(stored, QuantizedTensor) and stored.scheme.activations:
            self._round = rounder(stored.scheme, stored.input_scale)
        self._codes = stored if isinstance(stored, QuantizedTensor) and not expand else None
        self._plain = torch.empty(0)
        if isinstance(stored, QuantizedTensor) and expand:
            self._plain = torch.from_numpy(dequantize(stored))
        elif not isinstance(stored, QuantizedTensor):
            self._plain = to_torch(stored)
            if expand and stored.size <= _SMALL:
                self._plain = self._plain.float()
        self._length = stored.shape[0]

    def rows(self, chosen: slice | NDArray) -> Tensor:
        """Rows in fp32 `[…, hidden]`, by a slice or by token ids.

        Token ids may have any shape.
        """
        if self._codes is None:
            index = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen.astype(np.int64))
            return self._plain[index].float()
        if isinstance(chosen, slice):
            return torch.from_numpy(dequantize(self._codes.rows(chosen)))
        found = torch.from_numpy(dequantize(self._codes.rows(chosen.reshape(-1))))
        return found.reshape(*chosen.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[…, vocab]` of normed hidden states `[…, hidden]`."""
        x = hidden if self._round is None else self._round(hidden)
        pieces = range(0, self._length, _ROWS_AT_ONCE)
        return torch.cat([x @ self.rows(slice(i, i + _ROWS_AT_ONCE)).T for i in pieces], -1)


def open_tables(checkpoint: Checkpoint, expand: bool = False) -> tuple[Table, Table]:
    """A checkpoint's embedding and head: the same table when they are tied."""
    embedding = Table(checkpoint.linear(EMBEDDING), expand)
    if checkpoint.config.tie_word_embeddings:
        return embedding, embedding
    return embedding, Table(checkpoint.linear(checkpoint.config.head_module), expand)
