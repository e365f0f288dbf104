"""What a GGUF file holds, read with the standard library alone.

    "GGUF" │ version u32 │ tensors u64 │ values u64 │ values │ tensor table │ padding │ bytes
    value   name │ type u32 │ number, text, or array (type u32, count u64, items)
    tensor  name │ axes u32 │ sizes u64 … (fastest first) │ type u32 │ offset u64

Specification: ggml's docs/gguf.md. Of long arrays (vocabularies) only the length is kept. Anything that is not a GGUF
file raises InputError.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from qwen3_export.core.files import open_regular
from qwen3_export.errors import InputError

# Number, block length and bytes of a block of every type that a file holds (llama.cpp b11549).
TYPES = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}
ALIGNMENT = 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_KEPT_ITEMS = 16
_LONGEST_TEXT, _MOST_ITEMS, _MOST_AXES = 1 << 26, 1 << 28, 8
# What general.type says of files that are no models.
_OTHERS = ("imatrix", "adapter", "mmproj")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape, size, type, and where its data begin.

    The slowest axis of the shape comes first.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    begin: int = 0


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a GGUF file, and the tensors of all its parts.

    `truncated` names the first tensor whose data a file ends before, if there is one.
    """

    values: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...]
    truncated: str | None = None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a file's header, and those of the other parts of a split model.

    Raises InputError when it is no GGUF file.
    """
    return _joined({part: _read(part) for part in gguf_parts(path)})


def read_gguf_file(path: Path) -> GgufHeader:
    """The same of this file alone, whatever its name says of other parts."""
    return _joined({path: _read(path)})


def gguf_kind(path: Path) -> str:
    """`general.type` of this file alone: `model`, `imatrix`, `adapter` or `mmproj`.

    A file that states none, or cannot be read so far, is taken for a model.
    """
    with suppress(OSError, ValueError, struct.error, OverflowError), open_regular(path) as file:
        for name, value in _values(file, _counts(file)[1]):
            if name == "general.type":
                return str(value)
            # Vocabularies are long, and only models have one.
            if name.startswith("tokenizer."):
                break
    return "model"


def refuse_no_model(path: Path) -> None:
    """Raise InputError for an importance matrix, or another file that is no model."""
    kind = gguf_kind(path)
    if kind == "imatrix":
        raise InputError(f"{path}: an importance matrix, no model", "`gguf --imatrix` takes it, `inspect` shows it")
    if kind in _OTHERS:
        raise InputError(f"{path}: its general.type is {kind}, no model", "give the .gguf file of a whole model")


def read_whole_gguf(path: Path) -> GgufHeader:
    """The same of a file that llama.cpp can open.

    Raises InputError also where a part's name is not that of its header, and where a file ends before its tensors do.
    """
    found = {part: _read(part) for part in gguf_parts(path)}
    for number, (part, (values, _)) in enumerate(found.items()):
        _check_place(part, values, number, len(found))
    header = _joined(found)
    if header.truncated:
        raise InputError(header.truncated, "the file is truncated: copy, download or export it again")
    return header


def part_name(prefix: str, number: int, count: int) -> str:
    """A split model's name for one of its parts, which are counted from 1."""
    return f"{prefix}-{number:05}-of-{count:05}.gguf"


def _joined(found: Mapping[Path, tuple[dict[str, Any], list[GgufTensor]]]) -> GgufHeader:
    """The header of all parts: the first one's values, and every tensor."""
    tensors = tuple(tensor for _, listed in found.values() for tensor in listed)
    return GgufHeader(next(iter(found.values()))[0], tensors, tuple(found), _truncated(found))


def _truncated(found: Mapping[Path, tuple[dict[str, Any], list[GgufTensor]]]) -> str | None:
    """What a file lacks at its end, None where all tensors are whole."""
    for part, (_, tensors) in found.items():
        size = part.stat().st_size
        for tensor in tensors:
            if tensor.begin + tensor.bytes > size:
                return f"{part}: tensor {tensor.name} ends at byte {tensor.begin + tensor.bytes}, the file at {size}"
    return None


def _check_place(part: Path, values: Mapping[str, Any], number: int, count: int) -> None:
    """Raise InputError for a part whose header tells another place than its name."""
    stated = values.get("split.no", 0), values.get("split.count", 0) or 1
    if stated == (number, count):
        return
    if isinstance(stated[0], int) and isinstance(stated[1], int):
        right = part_name("PREFIX", stated[0] + 1, stated[1])
        raise InputError(
            f"{part}: by its header it is part {stated[0] + 1} of {stated[1]}, by its name {number + 1} of {count}",
            f"give every part its own name again, this one {right if stated[1] > 1 else 'one without numbers'}",
        )
    raise InputError(f"{part}: split.no and split.count are no whole numbers", "export or download it again")


def gguf_parts(path: Path) -> list[Path]:
    """All parts of a split model, whichever is named, or the file itself.

    They are told by their names. Raises InputError when one is missing.
    """
    split = _SPLIT.search(path.name)
    if not split:
        return [path]
    stem, count = path.name[: split.start()], int(split[2])
    if not 1 <= int(split[1]) <= count:
        raise InputError(f"{path}: there is no part {int(split[1])} of {count}", "give every part its own name again")
    parts = [path.with_name(part_name(stem, number, count)) for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part}: this part of the split model is missing", "keep all parts in one folder")
    return parts


def _read(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    try:
        with open_regular(path) as file:
            return _header(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path}: not a GGUF file ({error})", "copy, download or export it again") from error


def _header(file: BinaryIO) -> tuple[dict[str, Any], list[GgufTensor]]:
    tensors, count = _counts(file)
    values = dict(_values(file, count))
    listed = [_tensor(file) for _ in range(_limited(tensors, _MOST_ITEMS))]
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MOST_ITEMS:
        raise ValueError(f"general.alignment is {str(alignment)[:40]!r}")
    start = -(-file.tell() // alignment) * alignment
    return values, [replace(tensor, begin=start + tensor.begin) for tensor in listed]


def _counts(file: BinaryIO) -> tuple[int, int]:
    """Numbers of tensors and of values, from the first bytes."""
    if file.read(4) != b"GGUF":
        raise ValueError("its first bytes are not GGUF")
    version, tensors, count = _unpack(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    return tensors, count


def _values(file: BinaryIO, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(_limited(count, _MOST_ITEMS)):
        name = _string(file)
        yield name, _value(file, _unpack(file, "I")[0])


def _tensor(file: BinaryIO) -> GgufTensor:
    name = _string(file)
    sizes = _unpack(file, "Q" * _limited(_unpack(file, "I")[0], _MOST_AXES))
    kind, offset = _unpack(file, "IQ")
    label, block, size = TYPES.get(kind, (f"type {kind}", 1, 0))
    return GgufTensor(name, label, tuple(reversed(sizes)), math.prod(sizes) // block * size, offset)


def _value(file: BinaryIO, kind: int, nested: bool = False) -> Any:
    if kind in _NUMBERS:
        return _unpack(file, _NUMBERS[kind])[0]
    if kind == _TEXT:
        return _string(file)
    if kind != _ARRAY or nested:
        raise ValueError(f"a value of type {kind}")
    inner, count = _unpack(file, "IQ")
    if inner in _NUMBERS and count > _KEPT_ITEMS:
        file.seek(struct.calcsize(_NUMBERS[inner]) * _limited(count, _MOST_ITEMS), 1)
        return f"{count} numbers"
    items = []
    for i in range(_limited(count, _MOST_ITEMS)):
        item = _value(file, inner, nested=True)
        if i < _KEPT_ITEMS:
            items.append(item)
    return items if count <= _KEPT_ITEMS else f"{count} texts"


def _string(file: BinaryIO) -> str:
    length = _limited(_unpack(file, "Q")[0], _LONGEST_TEXT)
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("it is truncated")
    return raw.decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    raw = file.read(struct.calcsize(f"<{form}"))
    if len(raw) < struct.calcsize(f"<{form}"):
        raise ValueError("it is truncated")
    return struct.unpack(f"<{form}", raw)


def _limited(count: int, limit: int) -> int:
    if count > limit:
        raise ValueError(f"it claims {count} items")
    return int(count)
