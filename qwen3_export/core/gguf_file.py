"""Small GGUF files of fp32 tensors, written and read without a library.

The format is drawn in `core.gguf_header`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.disk import naming
from qwen3_export.core.gguf_header import ALIGNMENT, GgufTensor
from qwen3_export.errors import InputError

_MAGIC, _VERSION = b"GGUF", 3
_U32, _TEXT, _ARRAY, _FP32 = 4, 8, 9, 0


def read_fp32(path: Path, tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor of fp32, outermost axis first.

    Raises InputError when it has another type, or when the file is too short to hold it.
    """
    if tensor.type != "f32":
        raise InputError(f"{path}: tensor {tensor.name} is of type {tensor.type}, f32 was expected")
    if tensor.begin + tensor.bytes > path.stat().st_size:
        raise InputError(f"{path}: tensor {tensor.name} ends behind the file", "the file is truncated")
    return np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.begin).reshape(tensor.shape)


def write_fp32(path: Path, metadata: Mapping[str, str | int | list[str]], tensors: Mapping[str, NDArray]) -> None:
    """Write a small file of fp32 tensors.

    `metadata` may have texts, lists of texts and unsigned 32-bit numbers.
    """
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_packed(key), _packed_value(value)]
    offset = 0
    for name, array in tensors.items():
        parts += [_packed(name), struct.pack("<I", array.ndim), struct.pack(f"<{array.ndim}Q", *array.shape[::-1])]
        parts.append(struct.pack("<IQ", _FP32, offset))
        offset += -(-array.size * 4 // ALIGNMENT) * ALIGNMENT
    head = b"".join(parts)
    with naming(path), path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for array in tensors.values():
            data = np.ascontiguousarray(array, "<f4").tobytes()
            file.write(data + bytes(-len(data) % ALIGNMENT))


def _packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(value: str | int | list[str]) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _packed(value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_packed, value))
