"""The bytes of a GGUF file, or of its shards, written piece by piece.

    header · metadata · names, shapes and types of the tensors · padding · data of each tensor, padded to 32 bytes

Each shard has its number in its header; the other metadata is in the first one only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf.gguf_writer import TensorInfo
from numpy.typing import NDArray

from qwen3_export.core.disk import naming_full
from qwen3_export.core.gguf_header import ALIGNMENT
from qwen3_export.core.gguf_types import GGML_NUMBERS, block_size


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: name, numpy shape, type, and its matrices in order."""

    name: str
    shape: tuple[int, ...]
    type: str
    modules: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        block, size = block_size(self.type)
        return math.prod(self.shape) // block * size


def split(plan: Sequence[Planned], limit: int | None) -> list[list[Planned]]:
    """Tensors in shards of at most `limit` bytes; larger tensors alone."""
    if limit is None:
        return [list(plan)]
    shards: list[list[Planned]] = [[]]
    size = 0
    for item in plan:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def write_header(
    path: Path, architecture: str, plan: Sequence[Planned], describe: Callable[[gguf.GGUFWriter], None]
) -> None:
    """Everything before a file's data: `describe` adds the metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        describe(writer)
        for item in plan:
            # Not through `add_tensor_info`, which refuses types that this release of gguf-py does not know.
            kind: Any = GGML_NUMBERS[item.type]
            writer.tensors[-1][item.name] = TensorInfo(item.shape, kind, item.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def write_shard(
    path: Path, architecture: str, plan: Sequence[Planned], describe: Callable[[gguf.GGUFWriter], None],
    pieces: Callable[[Planned], Iterator[NDArray]], done: Callable[[], None],
) -> None:  # fmt: skip
    """Write one file; `pieces` gives a tensor's data."""
    with naming_full(path):
        write_header(path, architecture, plan, describe)
        with path.open("ab") as file:
            _pad(file)
            for item in plan:
                begin = file.tell()
                for piece in pieces(item):
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                assert file.tell() - begin == item.nbytes, item.name
                _pad(file)
                done()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
