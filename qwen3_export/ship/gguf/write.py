"""The bytes of a GGUF file, or of its shards, written piece by piece.

    header · metadata · names, shapes and types of the tensors · padding · data of each tensor, padded to 32 bytes

Shards are called NAME-00001-of-0000N.gguf. Each has its number in its header; the other metadata is in the first one
only. llama.cpp opens the first and finds the others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf.gguf_writer import TensorInfo
from numpy.typing import NDArray

from qwen3_export.core.disk import flush, naming_full
from qwen3_export.core.gguf_header import ALIGNMENT
from qwen3_export.core.gguf_types import GGML_NUMBERS, block_size
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.places import Inputs, checked_place


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


def shard_paths(output: Path, count: int) -> list[Path]:
    """Paths of an output's shards; the output itself if there is only one."""
    if count == 1:
        return [output]
    stem = output.name.removesuffix(".gguf")
    return [output.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def earlier_files(output: Path, paths: Sequence[Path]) -> list[Path]:
    """Files of an output that is there in another number of shards.

    These are the output's own name, and names that `shard_paths` could have given. llama.cpp's tools take all shards of
    a name for one model.
    """
    stem = re.escape(output.name.removesuffix(".gguf"))
    shard = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.gguf")
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    shards = [
        path for path in sorted(beside) if (names := shard.fullmatch(path.name)) and "00001" <= names[1] <= names[2]
    ]
    return [path for path in ([output] if os.path.lexists(output) else []) + shards if path not in paths]


def check_places(output: Path, count: int, force: bool, inputs: Inputs) -> None:
    """Raise InputError when a file of an output may not be replaced.

    That is one of its shards, or a file of an earlier output of its name.
    """
    paths, inputs = shard_paths(output, count), list(inputs)
    for path in (*paths, *earlier_files(output, paths)):
        checked_place(path, inputs, force, folder=False)


@contextmanager
def staged_files(output: Path, count: int, force: bool, inputs: Inputs) -> Iterator[list[Path]]:
    """Partial files for an output's shards, renamed when all are done.

    The first one is renamed last, since llama.cpp opens the others through it. Then the files of an earlier output in
    another number of shards are removed.
    """
    check_places(output, count, force, inputs := list(inputs))
    paths = shard_paths(output, count)
    earlier = earlier_files(output, paths)
    with ExitStack() as stack:
        partials = [stack.enter_context(staged_file(path, force, inputs)) for path in paths]
        yield partials
        for partial in partials:
            flush(partial)
    for path in earlier:
        path.unlink(missing_ok=True)


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
