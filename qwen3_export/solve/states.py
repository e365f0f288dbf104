"""Activations of all calibration rows, on disk.

The operating system's page cache keeps them in memory while there is room and writes them out when
there is not, so one path serves the 8M and the 32B model, the process itself stays small, and what
a killed run needs to go on is already in a file.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from qwen3_export.errors import InputError
from qwen3_export.model.block import State
from qwen3_export.model.workers import Workers


class RowFile:
    """`count` tensors of one shape and type in one file, each read and written on its own."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.path, self._shape, self._dtype = path, shape, dtype
        self._bytes = math.prod(shape) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self, row: int) -> Tensor:
        """Row `row`."""
        buffer = bytearray(self._bytes)
        if os.preadv(self._descriptor, [buffer], row * self._bytes) != self._bytes:
            raise InputError(f"{self.path}: row {row} is not there", "--no-resume starts over")
        return torch.frombuffer(buffer, dtype=self._dtype).reshape(self._shape)

    def write(self, row: int, tensor: Tensor) -> None:
        """Replace row `row`."""
        data = memoryview(tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
        offset = row * self._bytes
        while len(data):
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def keep_as(self, path: Path) -> None:
        """Flush to the disk and move to its lasting name."""
        os.fsync(self._descriptor)
        self.path.rename(path)
        self.path = path

    def close(self, remove: bool = False) -> None:
        """Close the file, and delete it when it is no longer needed."""
        os.close(self._descriptor)
        if remove:
            self.path.unlink(missing_ok=True)


class States:
    """The state of every row at the present stage of a block, one RowFile per field."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self.rows = folder, rows
        self._files: dict[str, RowFile] = {}
        self._generation = 0

    def read(self, row: int, fields: Collection[str] | None = None) -> State:
        """State of one row, batch axis included; all of its fields or some."""
        return {name: file.read(row) for name, file in self._files.items() if fields is None or name in fields}

    def advance(self, step: Callable[[int, State], State], pool: Workers) -> None:
        """Replace every row's state by `step(row, state)`; unchanged fields are not written again."""
        self._generation += 1
        fresh: dict[str, RowFile] = {}
        lock, names = threading.Lock(), set[str]()

        def one(row: int) -> None:
            before = self.read(row)
            after = step(row, before)
            for name, tensor in after.items():
                if tensor is before.get(name):
                    continue
                with lock:
                    if name not in fresh:
                        path = self._folder / f"{name}-{self._generation}.rows"
                        fresh[name] = RowFile(path, tuple(tensor.shape), tensor.dtype)
                fresh[name].write(row, tensor)
            names.update(after)

        try:
            pool.map(one, range(self.rows))
        finally:
            kept = {name: file for name, file in self._files.items() if name in names and name not in fresh}
            for file in set(self._files.values()) - set(kept.values()):
                file.close(remove=True)
            self._files = {**kept, **fresh}

    def take(self, name: str) -> RowFile:
        """Hand one field's file over to the caller and drop the others."""
        taken = self._files.pop(name)
        self.close()
        return taken

    def close(self) -> None:
        """Delete all files."""
        for file in self._files.values():
            file.close(remove=True)
        self._files = {}
