"""Seconds of the disk alone: reading a checkpoint, and writing its quantized folder's bytes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from qwen3_export.core.checkpoint import open_checkpoint

_PIECE = 1 << 24
# Bytes per weight: 4 bits, and 16 for the scale of 128 weights.
_BYTES_PER_WEIGHT = (4 + 16 / 128) / 8


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def quantized_bytes(checkpoint: Path) -> int:
    """Size of a bf16 checkpoint's folder at 4 bits in groups of 128."""
    config = open_checkpoint(checkpoint).config
    linears = config.all_linears()
    weights = sum(math.prod(shape) for shape in linears.values())
    whole = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    return int(weights * _BYTES_PER_WEIGHT) + 2 * (whole - weights)


def disk_seconds(checkpoint: Path, folder: Path) -> float:
    """Seconds to read the checkpoint uncached and to write a file to the disk."""
    evict(checkpoint)
    left, path = quantized_bytes(checkpoint), folder / "written"
    piece, begin = os.urandom(_PIECE), time.perf_counter()
    for source in checkpoint.glob("*.safetensors"):
        with source.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass
    with path.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(piece[:left])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds
