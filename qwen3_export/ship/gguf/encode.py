"""A matrix as data of a ggml type: copied, rounded, or its codes moved.

Several threads make pieces of rows, a few ahead of the writer, which gets them in order. So memory is bounded by the
pieces, or by the codes of one matrix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import pack
from qwen3_export.core.architecture import ROUTER, expert_of, is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.ggml_blocks import pack_blocks, pack_q2_0
from qwen3_export.core.gguf_types import gguf_name
from qwen3_export.core.processors import thread_count
from qwen3_export.core.scheme import scheme_of_type
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ggml import round_rows
from qwen3_export.ship.exactness import Change, Inexact, change_of, refuse_lost, refuse_overflow
from qwen3_export.ship.gguf.types import Types, widened

_ELEMENTS_AT_ONCE, _ROWS = 1 << 20, 32
_FLOATS: dict[str, np.dtype] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}
_PLAIN = {**_FLOATS, "bf16": np.dtype(ml_dtypes.bfloat16)}
# Types that are rounded without importance: q8_0's scale is that of its largest weight.
_UNWEIGHED = (*_PLAIN, "q8_0")
Made = TypeVar("Made")
# By the names of the tensors that could not be stored unchanged.
Changes = dict[str, Change]


@dataclass(frozen=True)
class Encoded:
    """Bytes of some rows, and the changes of numbers that were not stored exactly."""

    data: NDArray
    changes: Changes


class Encoder:
    """Turns matrices of a checkpoint into data, and collects what changed."""

    def __init__(
        self, checkpoint: Checkpoint, types: Types, importance: Mapping[str, NDArray], threads: int | None = None
    ) -> None:
        self.checkpoint, self.types, self.importance = checkpoint, types, importance
        self.threads = thread_count(threads)
        self.changes: Changes = {}

    def tasks(self, module: str, name: str) -> Iterator[Callable[[], Encoded]]:
        """Pieces of work whose results make up a matrix's data of type `name`."""
        if module in self.checkpoint.schemes:
            tensor = self.checkpoint.linear(module)
            assert isinstance(tensor, QuantizedTensor)
            for part in pieces_of_rows(tensor):
                if self._widens(module):
                    yield partial(repack, widen(part))
                elif module in self.types.requantized:
                    yield partial(self._requantize, module, name, part)
                else:
                    yield partial(repack, part)
            return
        for rows in self.cuts(module):
            yield partial(self._read, module, f"{module}.weight", name, rows)

    def cuts(self, module: str) -> list[slice]:
        """The rows of each piece of a matrix that is stored as numbers."""
        return _cut(self.checkpoint.entry(f"{module}.weight").shape)

    def keeps(self, module: str, name: str) -> bool:
        """Whether type `name` holds every number of a matrix's stored type."""
        stored = self.checkpoint.entry(f"{module}.weight").dtype
        return name in _PLAIN and (stored == _PLAIN[name] or np.can_cast(stored, _PLAIN[name]))

    def rounds_again(self, module: str) -> bool:
        """Whether a matrix's codes are rounded onto another type."""
        return module in self.types.requantized and not self._widens(module)

    def weighs(self, module: str, name: str) -> bool:
        """Whether a matrix is rounded so that the importance of its inputs matters."""
        rounded = module not in self.checkpoint.schemes or self.rounds_again(module)
        return rounded and module in self.types.modules and name not in _UNWEIGHED

    def _widens(self, module: str) -> bool:
        again = self.types.requantized.get(module)
        return again is not None and module not in self.checkpoint.reordered and widened(again.scheme) == again.type

    def _read(self, module: str, tensor: str, name: str, rows: slice) -> Encoded:
        weight = self.checkpoint.rows(tensor, rows.start, rows.stop)
        return encode(tensor, weight, name, self._weights(module))

    def _requantize(self, module: str, name: str, part: QuantizedTensor) -> Encoded:
        return encode(f"{module}.weight", dequantize(part), name, self._weights(module))

    def _weights(self, module: str) -> NDArray | None:
        """The importance `[in]` of a matrix's inputs, an expert's own; None when unknown."""
        if not self.importance or not module.startswith(("model.layers.", "lm_head", "model.embed")):
            return None
        if module.endswith(("norm", f".{ROUTER}")):
            return None
        found = self.importance.get(f"{gguf_name(module)}.weight")
        if found is None:
            return None
        expert = expert_of(module) if is_expert(module) else 0
        return found.reshape(-1, self._shapes[module][1])[expert]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return self.checkpoint.config.all_matrices()

    def note(self, changes: Changes) -> None:
        """Keep what has changed of every tensor."""
        for name, change in changes.items():
            self.changes[name] = self.changes.get(name, Change()).joined(change)

    def refuse_lost(self, modules: Iterable[str]) -> None:
        """Raise UnsupportedError for a matrix that its type does not hold."""
        for module in modules:
            for part in ("weight", "scales", "minimums"):
                if change := self.changes.get(f"{module}.{part}"):
                    kind = self.types.modules.get(module, "fp16") if part == "weight" else "fp16"
                    refuse_lost(f"{module}.{part}", change, kind)

    def inexact(self) -> list[Inexact]:
        """The tensors that could not be stored exactly, with their largest errors."""
        return [
            {"name": name, "max_rel_error": change.error} for name, change in self.changes.items() if change.furthest
        ]


def pieces_of_rows(tensor: QuantizedTensor) -> Iterator[QuantizedTensor]:
    """A quantized matrix in pieces of rows; whole where its rows belong together."""
    for rows in _cut(tensor.shape) if tensor.scheme.per_row else ():
        yield tensor.rows(rows)
    if not tensor.scheme.per_row:
        yield tensor


def _cut(shape: tuple[int, ...]) -> list[slice]:
    """Pieces of rows of a tensor; a tensor with one axis is one piece."""
    width = shape[1] if len(shape) > 1 else 1
    step = max(_ELEMENTS_AT_ONCE // width // _ROWS, 1) * _ROWS
    return [slice(begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step)]


def encode(tensor: str, weight: NDArray, name: str, importance: NDArray | None) -> Encoded:
    """16- or 32-bit weights as data of a type, rounded by `ggml.round_rows` where needed."""
    if name == "bf16":
        return _encode_bf16(tensor, weight)
    if name in _FLOATS:
        with np.errstate(over="ignore"):
            data = weight.astype(_FLOATS[name])
        return Encoded(data, _change(tensor, weight, data, name))
    found = round_rows(tensor, weight, scheme_of_type(name), importance)
    changes = {tensor: Change(found.furthest, found.largest, found.missed, found.whole)}
    refuse_overflow(tensor, max(found.furthest, found.largest), name)
    return Encoded(repack(found.tensor).data, changes)


def _encode_bf16(tensor: str, weight: NDArray) -> Encoded:
    if weight.dtype == ml_dtypes.bfloat16:
        return Encoded(weight.view(np.uint8), {})
    data = weight.astype(ml_dtypes.bfloat16)
    return Encoded(data.view(np.uint8), _change(tensor, weight, data, "bf16"))


def _change(tensor: str, weight: NDArray, stored: NDArray, name: str) -> Changes:
    if stored.dtype == weight.dtype or np.can_cast(weight.dtype, stored.dtype):
        return {}
    change = change_of(weight, stored)
    refuse_overflow(tensor, change.furthest, name)
    return {tensor: change}


def repack(tensor: QuantizedTensor) -> Encoded:
    """Bytes `[out, row bytes]` of a quantized matrix; codes unchanged, scales repeated per block."""
    scheme = tensor.scheme
    if scheme.ggml_type is not None or scheme.type == "float":
        return Encoded(pack_blocks(tensor), {})
    block = 64 if scheme.num_bits == 2 else pack.GGML_BLOCK
    repeat, scales = scheme.group_length(tensor.shape[1]) // block, tensor.scales32
    changes = _half_change(f"{tensor.name}.scales", scales)
    repeated = np.repeat(scales, repeat, 1)
    if tensor.zeros is None:
        packer = {2: pack_q2_0, 4: pack.pack_q4_0, 8: pack.pack_q8_0}[scheme.num_bits]
        return Encoded(packer(tensor.codes, repeated), changes)
    minimums = -tensor.zeros.astype(np.float32) * scales
    changes |= _half_change(f"{tensor.name}.minimums", minimums)
    return Encoded(pack.pack_q4_1(tensor.codes, repeated, np.repeat(minimums, repeat, 1)), changes)


def widen(tensor: QuantizedTensor) -> QuantizedTensor:
    """2- or 3-bit codes as 4-bit codes with the same meaning."""
    scheme = replace(tensor.scheme, num_bits=4)
    moved = (
        tensor.codes if tensor.zeros is not None else tensor.codes + np.uint8(scheme.midpoint - tensor.scheme.midpoint)
    )
    return replace(tensor, scheme=scheme, codes=moved)


def _half_change(name: str, values: NDArray[np.float32]) -> Changes:
    with np.errstate(over="ignore"):
        change = change_of(values, values.astype(np.float16))
    refuse_overflow(name, change.furthest, "fp16")
    return {name: change}


def in_order(tasks: Iterable[Callable[[], Made]], threads: int | None = None) -> Iterator[Made]:
    """Results of pieces of work in order, computed by threads a few ahead."""
    count = thread_count(threads)
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > count + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
