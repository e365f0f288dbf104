"""Importance matrices in both forms: metadata of other types, odd shapes, damaged bytes, no file at all."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np

from tests.hostile.damage import change_bytes, replace_file
from tests.hostile.trial import Place, Trial

_VALUES: tuple[Any, ...] = (-1, 0, 2**63, 0.5, float("nan"), True, "", "x", "9" * 400, [1, 2], ["a"], [0.5] * 100)
_KEYS = ("imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets", "general.type", "general.alignment")
_SHAPES = ((), (0,), (1,), (1, 1), (64,), (1, 64), (3, 64), (2, 2, 16), (1, 0))


def make(random: Random, place: Place) -> Trial:
    """A matrix for `gguf --imatrix` and `inspect`."""
    path = place.copy("imatrix")
    roll = random.random()
    if roll < 0.3:
        what = change_bytes(random, path, first=random.choice((64, 1024, None)))
    elif roll < 0.4:
        what = replace_file(random, path)
    elif roll < 0.8:
        what = _own(random, path)
    else:
        what = _older(random, path)
    if random.random() < 0.5:
        return Trial(what, ("inspect", path))
    command = ("gguf", place.base("model"), "--type", "q4_k_m", "--imatrix", path, "--output", place.out)
    return Trial(what, command, outputs=(place.out,))


def _own(random: Random, path: Path) -> str:
    """A sound GGUF file with an odd value or tensor in it."""
    key, value, shape = random.choice(_KEYS), random.choice(_VALUES), random.choice(_SHAPES)
    writer = gguf.GGUFWriter(None, "imatrix")
    writer.add_key_value("general.type", "imatrix", gguf.GGUFValueType.STRING)
    _add(writer, key, value)
    for name, form in (("blk.0.attn_q.weight.in_sum2", shape), ("blk.0.attn_q.weight.counts", (1, 1))):
        writer.add_tensor(name, np.full(form or (1,), random.choice((1.0, np.nan, -1.0)), np.float32))
    if not shape:
        next(iter(writer.tensors[0].values())).shape = ()
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"{key} is {ascii(value)[:20]}, sums of shape {shape}"


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT64 if value != -1 else gguf.GGUFValueType.INT64,
        float: gguf.GGUFValueType.FLOAT64,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
    }
    writer.kv_data[0][key] = gguf.GGUFValue(value, kinds[type(value)])


def _older(random: Random, path: Path) -> str:
    """The form that llama.cpp wrote before, with odd numbers in it."""
    entries, length, calls, size = (random.choice((0, 1, 1, 1, -1, 2**31 - 1)) for _ in range(4))
    name = random.choice((b"blk.0.attn_q.weight", b"", b"\xff"))
    data = struct.pack("<ii", entries, min(len(name) * length, 2**31 - 1)) + name
    data += (
        struct.pack("<ii", calls, min(64 * size, 2**31 - 1)) + np.full(64, random.choice((1, np.nan)), "<f4").tobytes()
    )
    path.write_bytes(data + random.choice((b"", struct.pack("<ii", 3, -1), b"\x01")))
    return f"older form: {entries} entries, {calls} calls, {size} × 64 values"
