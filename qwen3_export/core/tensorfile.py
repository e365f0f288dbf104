"""safetensors files, read lazily and written as a stream.

    8 bytes  n, little-endian │ n bytes of JSON │ tensor bytes
    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}

The `safetensors` library maps whole files and wants every tensor in memory to write one; here a
tensor is read by its own offsets and written as it comes, so memory is bounded by one tensor. The
header is checked before anything is believed: sizes, offsets, overlaps, holes, duplicate names. A tensor
that holds NaN or infinity never leaves a file, however it is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.disk import naming
from qwen3_export.core.files import open_regular
from qwen3_export.core.finite import all_finite
from qwen3_export.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000
# Small enough for a core's cache.
_PIECE = 1 << 20
_MOST_AXES = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: type, shape, and place of its bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file whose header was checked; raises CheckpointError when it is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                header, start = self._read_header(file)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = {} if metadata is None else metadata
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise self._fail("its __metadata__ is no object of texts")
        self.entries = {name: self._entry(name, item, start) for name, item in header.items()}
        self._check_layout(start)

    def _fail(self, message: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}", hint)

    def _read_header(self, file: Any) -> tuple[dict[str, Any], int]:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise self._fail("too short to be a safetensors file", "download it again")
        length = int.from_bytes(prefix, "little")
        if length > min(self.size - 8, _HEADER_LIMIT):
            raise self._fail(
                f"its header claims {length} bytes, the file has {self.size}", "it is truncated or no safetensors file"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"its header is no valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._fail("its header is no JSON object")
        return header, 8 + length

    def _entry(self, name: str, item: Any, start: int) -> Entry:
        try:
            dtype, shape, (begin, end) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._fail(f"tensor {name}: its header entry is malformed or its dtype unknown ({error})") from error
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise self._fail(f"tensor {name}: shape and offsets must be whole numbers, not negative, on <= 64 axes")
        wanted = math.prod(shape) * dtype.itemsize
        if end - begin != wanted:
            raise self._fail(f"tensor {name}: {list(shape)} needs {wanted} bytes, its offsets span {end - begin}")
        if start + end > self.size:
            raise self._fail(
                f"tensor {name}: its data ends at byte {start + end}, the file at {self.size}",
                "the file is truncated: download it again",
            )
        return Entry(dtype, shape, start + begin, start + end)

    def _check_layout(self, start: int) -> None:
        position = start
        for name, entry in sorted(self.entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
            if entry.begin != position:
                kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
                raise self._fail(f"tensor {name}: its data {kind}")
            position = entry.end
        if position != self.size:
            raise self._fail(f"{self.size - position} bytes follow the last tensor")

    def read(self, name: str) -> NDArray:
        """The whole tensor, in its stored type."""
        entry = self.entries[name]
        return self._read(name, entry.begin, entry.end, entry.shape)

    def rows(self, name: str, begin: int, end: int) -> NDArray:
        """Rows `begin:end` of the first axis."""
        entry = self.entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(name, entry.begin + begin * row, entry.begin + end * row, (end - begin, *entry.shape[1:]))

    def pieces(self, name: str) -> Iterator[NDArray]:
        """The tensor's elements in order, `[n]` at a time in the stored type.

        Every piece lies in the same memory, so it is gone when the next one comes. New memory for each tensor costs
        more than reading it: the kernel zeroes every page first.
        """
        entry = self.entries[name]
        left = entry.end - entry.begin
        buffer = memoryview(bytearray(min(left, _PIECE)))
        try:
            with self.path.open("rb") as file:
                file.seek(entry.begin)
                while left:
                    part = buffer[:left]
                    if file.readinto(part) < len(part):
                        raise self._fail(f"tensor {name}: the file became shorter while it was read")
                    piece = np.frombuffer(part, entry.dtype)
                    self.check_finite(name, piece)
                    yield piece
                    left -= len(part)
        except OSError as error:
            raise self._fail(f"tensor {name}: cannot be read ({error})", "the file changed or is truncated") from error

    def _read(self, name: str, begin: int, end: int, shape: tuple[int, ...]) -> NDArray:
        entry = self.entries[name]
        try:
            array = np.fromfile(self.path, entry.dtype, (end - begin) // entry.dtype.itemsize, offset=begin)
            array = array.reshape(shape)
        except (OSError, ValueError) as error:
            raise self._fail(f"tensor {name}: cannot be read ({error})", "the file changed or is truncated") from error
        self.check_finite(name, array)
        return array

    def check_finite(self, name: str, piece: NDArray) -> None:
        """Raise CheckpointError when a piece of a tensor holds NaN or infinity."""
        if not all_finite(piece):
            raise self._fail(
                f"tensor {name}: it holds NaN or infinity",
                "the file is damaged, or the training diverged: download it again, or use an earlier checkpoint",
            )


class StoredTensor:
    """A tensor still in its file, to be read whole or in pieces."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self._file, self._name = file, name
        self.dtype, self.shape = file.entries[name].dtype, file.entries[name].shape

    def whole(self) -> NDArray:
        """All of it."""
        return self._file.read(self._name)

    def pieces(self) -> Iterator[NDArray]:
        """Its elements in order, see `TensorFile.pieces`."""
        return self._file.pieces(self._name)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


Spec = tuple[np.dtype, tuple[int, ...]]


class TensorFileWriter:
    """Writes one safetensors file tensor by tensor, in the order of `specs`.

    The caller owns atomicity: write to a temporary path, close, rename. Leaving the `with` block
    normally checks that every tensor came and flushes the file to the disk.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        self._specs = dict(specs)
        self._pending: Iterator[str] = iter(self._specs)
        self._path, self._file = path, path.open("wb")
        self._append(_header(self._specs, metadata or {"format": "pt"}))

    def _append(self, data: bytes | memoryview) -> None:
        with naming(self._path):
            self._file.write(data)

    def write(self, name: str, array: NDArray) -> None:
        """Append the next tensor; its name, type and shape must be the announced ones."""
        expected = next(self._pending, None)
        dtype, shape = self._specs.get(name, (None, None))
        if name != expected or array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} {array.dtype} {array.shape} written, {expected} {dtype} {shape} announced")
        self._append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    @contextmanager
    def pieces(self, name: str) -> Iterator[Callable[[NDArray], None]]:
        """Append the next tensor in pieces of its first axis.

        Together they must fill it.
        """
        dtype, shape = self._specs[name]
        if name != next(self._pending, None):
            raise ValueError(f"{name} is not the next announced tensor")
        begin = self._file.tell()

        def write(piece: NDArray) -> None:
            if piece.dtype != dtype or piece.shape[1:] != shape[1:]:
                raise ValueError(f"{name}: a piece is {piece.dtype} {piece.shape}, {dtype} {shape} was announced")
            self._append(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

        yield write
        if self._file.tell() - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: the pieces do not fill {shape}")

    def copy(self, name: str, source: TensorFile) -> None:
        """Append a tensor of another file byte for byte, in pieces."""
        entry = source.entries[name]
        if name != next(self._pending, None) or (entry.dtype, entry.shape) != self._specs[name]:
            raise ValueError(f"{name} {entry.dtype} {entry.shape} is not the next announced tensor")
        for piece in source.pieces(name):
            self._append(piece.view(np.uint8).data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with naming(self._path), self._file:
            if kind is None:
                if (missing := next(self._pending, None)) is not None:
                    raise ValueError(f"{missing} was announced and never written")
                self._file.flush()
                os.fsync(self._file.fileno())


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    items: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in specs.items():
        end = position + math.prod(shape) * dtype.itemsize
        items[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(items, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, NDArray]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are all at hand; see TensorFileWriter for atomicity."""
    arrays = dict(tensors)
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with TensorFileWriter(path, specs, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
