"""Weights of a block that are read from the checkpoint when they are needed.

A layer of experts may be larger than memory. Its weights have three forms:

    as stored    read from the checkpoint in fp32, with folds applied again
    codes        solved weights, dequantized
    running      either of these in the type of the products; kept while there is room, the oldest dropped first

The rest of the block is in memory. The numbers are the same as in a block that is in memory as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.model.windows import RESIDENT_BYTES, WINDOW_BYTES

Change = Callable[[Tensor], Tensor]


class StreamedWeights(MutableMapping[str, Tensor]):
    """Weights by local name, some of which are read when needed.

    `read` gives a weight of `streamed` in fp32; `sizes` are their numbers of weights. Several threads may read at once.
    """

    def __init__(
        self, resident: Mapping[str, Tensor], sizes: Mapping[str, int], read: Callable[[str], Tensor],
        dtype: torch.dtype | None = None, changes: Mapping[str, list[Change]] | None = None,
    ) -> None:  # fmt: skip
        self._resident, self._sizes, self._read, self._dtype = dict(resident), dict(sizes), read, dtype
        self._changes: dict[str, list[Change]] = {name: list(made) for name, made in (changes or {}).items()}
        self._streamed, self._codes, self._lock = dict.fromkeys(sizes), dict[str, QuantizedTensor](), threading.Lock()
        self._running, self._room = dict[str, Tensor](), 0
        self._most = RESIDENT_BYTES if 2 * sum(sizes.values()) <= RESIDENT_BYTES else WINDOW_BYTES

    def __getitem__(self, name: str) -> Tensor:
        if name in self._resident:
            return self._resident[name]
        if self._dtype is not None:
            return self.running(name, self._dtype)
        return self._made(name)

    def _made(self, name: str) -> Tensor:
        """In fp32."""
        if name in self._codes:
            return torch.from_numpy(dequantize(self._codes[name]))
        if name not in self._streamed:
            raise KeyError(name)
        weight = self._read(name)
        for change in self._changes.get(name, ()):
            weight = change(weight)
        return weight

    def running(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in the type of the products."""
        if name in self._resident:
            return self._resident[name].to(dtype)
        with self._lock:
            if (kept := self._running.get(name)) is not None:
                return kept
        made = self._made(name).to(dtype)
        with self._lock:
            if name not in self._running:
                self._running[name] = made
                self._room += made.nbytes
            while self._room > self._most and len(self._running) > 1:
                oldest = next(iter(self._running))
                self._room -= self._running.pop(oldest).nbytes
        return made

    def change(self, name: str, change: Change) -> None:
        """Change a weight, now or whenever it is read."""
        if name in self._resident:
            self._resident[name] = change(self._resident[name])
        else:
            self._changes.setdefault(name, []).append(change)
            self._forget(name)

    def put(self, name: str, tensor: QuantizedTensor) -> None:
        """Replace a weight by codes."""
        self._resident.pop(name, None)
        self._codes[name] = tensor
        self._forget(name)

    def in_type(self, dtype: torch.dtype, linears: Iterable[str]) -> StreamedWeights:
        """A copy of the present weights with `linears` in the type of the products."""
        chosen = set(linears)
        resident = {n: weight.to(dtype) if n in chosen else weight for n, weight in self._resident.items()}
        sizes = {name: self._sizes[name] for name in self._streamed}
        return StreamedWeights(resident, sizes, self._read, dtype, self._changes)

    def is_streamed(self, name: str) -> bool:
        """Whether a weight is read when needed."""
        return name not in self._resident

    def _forget(self, name: str) -> None:
        with self._lock:
            if (kept := self._running.pop(name, None)) is not None:
                self._room -= kept.nbytes

    def __setitem__(self, name: str, weight: Tensor) -> None:
        self._resident[name] = weight
        self._codes.pop(name, None)
        self._forget(name)

    def __delitem__(self, name: str) -> None:
        if self._resident.pop(name, None) is None and name not in self._streamed:
            raise KeyError(name)
        self._streamed.pop(name, None)
        self._codes.pop(name, None)
        self._forget(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._resident, *self._codes, *self._streamed)))

    def __len__(self) -> int:
        return len(list(iter(self)))


def change(weights: MutableMapping[str, Tensor], name: str, made: Change) -> None:
    """Change one weight of a block."""
    if isinstance(weights, StreamedWeights):
        weights.change(name, made)
    else:
        weights[name] = made(weights[name])
