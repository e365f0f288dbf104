"""Several sequences decoded together: an ONNX session whose cache has a slot for each.

    slot          0        1        2     …      a row of every cache [slots, kv_heads, capacity, head_dim]
    length       17        5       90            number of filled positions, given by the attention mask
    step      one token of every slot in one run: the weights are read once for all

`GroupQueryAttention` accepts rows of different lengths if its cache is written in place. A new sequence is prefilled by
itself and then copied into the next slot. When a sequence ends, the last slot is moved into its place.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.run.ort import OrtSession
from qwen3_export.run.session import Session, check_logits

_SMALLEST_CACHE = 256


class Batch(Protocol):
    """Sequences in progress, numbered from 0 without gaps."""

    slots: int

    def admit(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Begin one more sequence with the next number; logits `[vocab]` of its next token."""

    def step(self, tokens: list[int]) -> NDArray[np.float32]:
        """Append a token to every sequence; logits `[sequences, vocab]`."""

    def leave(self, number: int) -> None:
        """End a sequence; the last one takes its number."""


def batch_of(session: Session, slots: int) -> Batch:
    """A batch of `slots` sequences over a session, of one where the runtime cannot."""
    if isinstance(session, OrtSession) and session.is_ours and session.device == "cpu":
        return _OrtBatch(session, slots)
    return _Single(session)


class _Single:
    """One sequence at a time, in any session."""

    slots = 1

    def __init__(self, session: Session) -> None:
        self._session = session

    def admit(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._session.prefill(ids)[-1]

    def step(self, tokens: list[int]) -> NDArray[np.float32]:
        return self._session.decode(tokens[0])[None]

    def leave(self, number: int) -> None:
        """Does nothing: the next prefill starts a new sequence."""


class _OrtBatch:
    """See the module's docstring."""

    def __init__(self, session: OrtSession, slots: int) -> None:
        self.slots, self._owner = slots, session
        self._binding = session.new_binding()
        self._lengths: list[int] = []
        self._capacity = 0
        self._caches: dict[str, NDArray] = {}

    def admit(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = self._owner.prefill(ids)[-1]
        number, length = len(self._lengths), len(ids)
        self._reserve(length + 1)
        for name, values in self._owner.cache_values().items():
            self._caches[name][number, :, :length] = values[0, :, :length]
        self._lengths.append(length)
        return logits

    def step(self, tokens: list[int]) -> NDArray[np.float32]:
        count, total = len(self._lengths), max(self._lengths) + 1
        self._reserve(total)
        lengths = np.array(self._lengths)
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array(tokens, np.int64)[:, None])
        binding.bind_cpu_input("attention_mask", (np.arange(total) <= lengths[:, None]).astype(np.int64))
        binding.bind_cpu_input("position_ids", lengths.astype(np.int64)[:, None])
        for name, cache in self._caches.items():
            place: tuple[Any, ...] = ("cpu", 0, cache.dtype, (count, *cache.shape[1:]), cache.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        binding.bind_output("logits")
        self._owner.run_bound(binding)
        self._lengths = [length + 1 for length in self._lengths]
        found: NDArray = binding.get_outputs()[-1].numpy()
        return check_logits(found[:, -1].astype(np.float32, copy=False), f"a batch in {self._owner.runtime}")

    def leave(self, number: int) -> None:
        last = len(self._lengths) - 1
        if number != last:
            length = self._lengths[last]
            for cache in self._caches.values():
                cache[number, :, :length] = cache[last, :, :length]
            self._lengths[number] = length
        self._lengths.pop()

    def _reserve(self, positions: int) -> None:
        """Make room for so many positions in every slot, and keep the present ones."""
        if positions <= self._capacity:
            return
        self._capacity = max(positions, 2 * self._capacity, _SMALLEST_CACHE)
        for name, (shape, dtype) in self._owner.cache_shapes().items():
            buffer = np.zeros((self.slots, shape[1], self._capacity, shape[3]), dtype)
            for number, length in enumerate(self._lengths):
                buffer[number, :, :length] = self._caches[name][number, :, :length]
            self._caches[name] = buffer
