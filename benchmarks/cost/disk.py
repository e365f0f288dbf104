"""What the disk alone takes: reading a checkpoint once, and writing as many bytes as its quantized folder has."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from qwen3_export.core.checkpoint import open_checkpoint

_PIECE = 1 << 24
# 4 bits, and 16 for the scale of 128 weights.
_BYTES_PER_WEIGHT = (4 + 16 / 128) / 8


def evict(folder: Path) -> None:
    """Let the system forget a folder's files, so that they are read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def quantized_bytes(checkpoint: Path) -> int:
    """Size of the folder that a W4 recipe of group 128 makes of a bf16 checkpoint."""
    config = open_checkpoint(checkpoint).config
    linears = config.all_linears()
    weights = sum(math.prod(shape) for shape in linears.values())
    whole = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    return int(weights * _BYTES_PER_WEIGHT) + 2 * (whole - weights)


def disk_seconds(checkpoint: Path, folder: Path) -> float:
    """Read the checkpoint, not from memory, and write a file to the disk; seconds."""
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
