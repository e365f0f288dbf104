"""Activations of all calibration samples, on disk.

The operating system's page cache keeps them in memory while there is room and writes them out when
there is not, so one path serves the 8M and the 32B model, the process itself stays small, and what
a killed run needs to go on is already in a file.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.disk import naming
from qwen3_export.errors import StateError
from qwen3_export.model.table import Table
from qwen3_export.model.workers import Workers

# Of a file that is to last, so many bytes are brought to the disk as soon as they are there.
_EARLY = 64 << 20
# Samples that a worker of a cluster is given together.
TOGETHER = 4


class SampleFile:
    """One tensor per sample, all of one shape and type, in one file.

    Each is read and written on its own. `early`: the file is to last, so that what is written goes to the disk
    beside the work and not at its end.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, early: bool = False
    ) -> None:
        self.path, self.lasting, self._shape, self._dtype = path, False, shape, dtype
        self._early, self._lock, self._waiting = early, threading.Lock(), 0
        self._flushing: Future[None] | None = None
        self._bytes = math.prod(shape) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    @property
    def form(self) -> tuple[list[int], str]:
        """Shape and type of a sample's tensor.

        Another process that opens the same file must know them.
        """
        return list(self._shape), str(self._dtype).removeprefix("torch.")

    def read(self, sample: int, count: int = 1) -> Tensor:
        """One sample's tensor, or those of several, one below the other."""
        found = torch.empty((count * self._shape[0], *self._shape[1:]), dtype=self._dtype)
        if os.preadv(self._descriptor, [_bytes(found)], sample * self._bytes) != count * self._bytes:
            raise StateError(f"{self.path}: sample {sample} is not there", "--no-resume starts over")
        return found

    def rows(self, sample: int, chosen: Tensor) -> Tensor:
        """Some rows `[n, last axis]` of one sample's tensor; the rest is not read.

        All axes but the last are taken as one.
        """
        begin = sample * self._bytes
        before = begin % mmap.ALLOCATIONGRANULARITY
        if os.fstat(self._descriptor).st_size < begin + self._bytes:
            raise StateError(f"{self.path}: sample {sample} is not there", "--no-resume starts over")
        size = before + self._bytes
        with mmap.mmap(self._descriptor, size, access=mmap.ACCESS_COPY, offset=begin - before) as mapped:
            whole = torch.frombuffer(mapped, dtype=self._dtype, count=math.prod(self._shape), offset=before)
            found = whole.view(-1, self._shape[-1]).index_select(0, chosen)
            # What looks into the mapping must be gone before it is.
            del whole
        return found

    def write(self, sample: int, tensor: Tensor) -> None:
        """Replace one sample's tensor, or those of several from that one on."""
        data = _bytes(tensor.contiguous().cpu())
        offset = sample * self._bytes
        with naming(self.path):
            while len(data):
                written = os.pwrite(self._descriptor, data, offset)
                data, offset = data[written:], offset + written
        if self._early:
            self._flush(tensor.nbytes)

    def _flush(self, size: int) -> None:
        """Start to flush where enough has been written since it was last begun."""
        with self._lock:
            self._waiting += size
            if self._waiting < _EARLY or not (self._flushing is None or self._flushing.done()):
                return
            self._flushed()
            self._waiting, self._flushing = 0, Future()
            threading.Thread(target=_flush_into, args=(self._flushing, self._descriptor)).start()

    def _flushed(self) -> None:
        """Wait for what was begun.

        The system reports a failure only once, to whoever flushes next.
        """
        if self._flushing is not None:
            with naming(self.path):
                self._flushing.result()

    def keep_as(self, path: Path) -> None:
        """Flush to the disk and move to its lasting name.

        From then on only its owner deletes it.
        """
        self._flushed()
        with naming(self.path):
            os.fsync(self._descriptor)
        self.path.rename(path)
        self.path, self.lasting = path, True

    def open_again(self) -> None:
        """See what other machines have written.

        A network file system shows it to whoever opens a file.
        """
        self._flushed()
        try:
            fresh = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return  # Another worker is further on already, and has moved it.
        os.close(self._descriptor)
        self._descriptor = fresh

    def close(self, remove: bool = False) -> None:
        """Close the file, and delete it when it is no longer needed."""
        if self._flushing is not None:
            wait([self._flushing])
        os.close(self._descriptor)
        if remove and not self.lasting:
            self.path.unlink(missing_ok=True)


def write_embeddings(
    file: SampleFile, table: Table, samples: Sequence[NDArray], pool: Workers | None = None
) -> None:  # fmt: skip
    """Write the hidden states before block 0.

    They are `[1, tokens, hidden]` in fp32 for each sample of token ids `[tokens]`. `pool` is given where workers may
    share the file.
    """

    def write(sample: int) -> None:
        file.write(sample, table.rows(samples[sample])[None])

    if pool is not None:
        share_samples(pool, "embed", write, len(samples), file)
        return
    for sample in range(len(samples)):
        write(sample)


def each(pool: Workers, function: Callable[[int], None], pieces: Sequence[range]) -> None:
    """Call `function` for every sample of some pieces."""
    pool.map(function, [sample for piece in pieces for sample in piece])


def share_samples(
    pool: Workers, label: str, function: Callable[[int], None], count: int, file: SampleFile
) -> None:  # fmt: skip
    """Call `function` once for each of `count` samples.

    What it leaves is in `file`, which all workers see.
    """
    pieces = [range(begin, min(begin + TOGETHER, count)) for begin in range(0, count, TOGETHER)]
    pool.share(label, pieces, lambda some: each(pool, function, some), lambda _: {}, lambda *_: None)
    if pool.is_shared:
        file.open_again()


def _flush_into(done: Future[None], descriptor: int) -> None:
    try:
        os.fsync(descriptor)
        done.set_result(None)
    except OSError as error:
        done.set_exception(error)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]


class SpareFiles:
    """Files that are no longer needed, kept to be written over.

    A file system takes many times as long to find room for new ones, and the same sizes come again in every
    block. `folder` holds nothing else, and is emptied at first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._by_size, self._count, self._lock = folder, dict[int, list[Path]](), 0, threading.Lock()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def put(self, path: Path) -> None:
        """Take a file in."""
        with self._lock:
            kept, self._count = self._folder / f"{self._count}.samples", self._count + 1
            size = path.stat().st_size
            path.rename(kept)
            self._by_size.setdefault(size, []).append(kept)

    def find(self, path: Path, size: int) -> None:
        """Move a file of so many bytes to `path`, if there is one."""
        with self._lock:
            if spare := self._by_size.get(size):
                spare.pop().rename(path)
