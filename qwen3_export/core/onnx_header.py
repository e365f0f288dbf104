"""What an ONNX file holds, read from its protobuf bytes.

The standard library alone reads it.

    ModelProto    1 ir_version  2 producer  3 its version  7 graph  8 opset (1 domain, 2 version)  14 metadata
    GraphProto    1 node  5 initializer  11 input  12 output
    NodeProto     3 name  4 op_type  5 attribute  7 domain
    TensorProto   1 dims  2 type  8 name  9 raw bytes  13 external data (1 key, 2 value)
    ValueInfo     1 name  2 type (1 tensor (1 element type, 2 shape (1 axis (1 number, 2 name))))

Weights are skipped, never read. Field numbers: onnx.proto of the ONNX specification; wire format: the protobuf
encoding guide. Raises InputError for what is no such file.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3_export.core.files import open_regular
from qwen3_export.errors import InputError

Buffer = memoryview
Value = int | memoryview
# Element types of TensorProto: name and bits.
TYPES = {
    1: ("fp32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("fp16", 16),
    11: ("fp64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bf16", 16),
    17: ("fp8 e4m3fn", 8),
    18: ("fp8 e4m3fnuz", 8),
    19: ("fp8 e5m2", 8),
    20: ("fp8 e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("fp4 e2m1", 4),
    24: ("fp8 e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
_DEEPEST = 8


@dataclass(frozen=True)
class OnnxTensor:
    """One weight: its type, shape, size, and data file.

    The data file is None where the graph itself holds it, and `end` is the place in it where the weight ends.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    file: str | None
    end: int = 0


@dataclass(frozen=True)
class OnnxHeader:
    """A model without its weights' values."""

    producer: str
    opsets: dict[str, int]
    metadata: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    tensors: tuple[OnnxTensor, ...]


def read_onnx_header(path: Path) -> OnnxHeader:
    """Read a file's header; InputError when it is no ONNX model."""
    try:
        with open_regular(path) as file:
            # Unmapped when the last view into it is gone.
            return _model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, LookupError) as error:
        raise InputError(f"{path}: not an ONNX model ({error})") from error


def onnx_data_files(path: Path) -> list[Path]:
    """The files beside the graph that hold its weights.

    Those that are not there are left out.
    """
    names = {tensor.file for tensor in read_onnx_header(path).tensors if tensor.file}
    return [found for name in sorted(names) if (found := path.parent / name).is_file()]


def check_onnx_data(path: Path) -> None:
    """Raise InputError where a data file is missing, too short or outside."""
    ends: dict[str, int] = {}
    for tensor in read_onnx_header(path).tensors:
        if tensor.file is not None:
            ends[tensor.file] = max(tensor.end, ends.get(tensor.file, 0))
    for name, end in sorted(ends.items()):
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: its weights lie outside of the folder, in {name}", "export it again")
        if not file.is_file():
            raise InputError(f"{file}: missing; {path.name} keeps its weights there", "copy or export the folder again")
        if file.stat().st_size < end:
            raise InputError(
                f"{file}: {file.stat().st_size} bytes, {path.name} expects {end}",
                "the file is truncated: copy or export the folder again",
            )


def _model(data: Buffer) -> OnnxHeader:
    texts = {2: "", 3: ""}
    opsets: dict[str, int] = {}
    metadata: dict[str, str] = {}
    graph: Buffer | None = None
    for number, value in _fields(data):
        if number in texts:
            texts[number] = _text(value)
        elif number == 7:
            graph = _inner(value)
        elif number == 8:
            parts = dict(_fields(_inner(value)))
            opsets[_text(parts[1]) if 1 in parts else ""] = _number(parts.get(2, 0))
        elif number == 14:
            parts = dict(_fields(_inner(value)))
            metadata[_text(parts.get(1, memoryview(b"")))] = _text(parts.get(2, memoryview(b"")))
    if graph is None or not opsets:
        raise ValueError("no graph in it")
    named = {domain or "ai.onnx": version for domain, version in opsets.items()}
    operators: Counter[str] = Counter()
    tensors: list[OnnxTensor] = []
    ends: dict[int, dict[str, str]] = {11: {}, 12: {}}
    for number, value in _graph_fields(graph, operators):
        if number == 5:
            tensors.append(_tensor(_inner(value)))
        elif number in ends:
            name, described = _value_info(_inner(value))
            ends[number][name] = described
    stored = {tensor.name for tensor in tensors}
    inputs = {name: described for name, described in ends[11].items() if name not in stored}
    producer = f"{texts[2]} {texts[3]}".strip()
    return OnnxHeader(producer, named, metadata, inputs, ends[12], dict(operators.most_common()), tuple(tensors))


def _graph_fields(graph: Buffer, operators: Counter[str], depth: int = 0) -> Iterator[tuple[int, Value]]:
    """A graph's fields.

    Its nodes, and those of the graphs in their attributes, are counted.
    """
    if depth > _DEEPEST:
        raise ValueError("graphs nested too deeply")
    for number, value in _fields(graph):
        if number != 1:
            yield number, value
            continue
        kind, domain = "", ""
        for field, part in _fields(_inner(value)):
            if field == 4:
                kind = _text(part)
            elif field == 7:
                domain = _text(part)
            elif field == 5:
                for inner, content in _fields(_inner(part)):
                    # Field 6 of an attribute is a graph; its weights belong to the model too.
                    if inner == 6:
                        nested = _graph_fields(_inner(content), operators, depth + 1)
                        yield from ((found, item) for found, item in nested if found == 5)
        operators[f"{domain}.{kind}" if domain not in ("", "ai.onnx") else kind] += 1


def _tensor(data: Buffer) -> OnnxTensor:
    name, kind, shape, outside = "", 0, list[int](), dict[str, str]()
    for number, value in _fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2:
            kind = _number(value)
        elif number == 8:
            name = _text(value)
        elif number == 13:
            parts = dict(_fields(_inner(value)))
            outside[_text(parts[1])] = _text(parts[2])
    label, bits = TYPES.get(kind, (f"type {kind}", 0))
    size = math.ceil(math.prod(shape) * bits / 8)
    end = int(outside.get("offset") or 0) + int(outside.get("length") or size)
    return OnnxTensor(name, label, tuple(shape), size, outside.get("location"), end)


def _value_info(data: Buffer) -> tuple[str, str]:
    """A graph input's or output's name, and its type and shape as text."""
    parts = dict(_fields(data))
    name = _text(parts.get(1, memoryview(b"")))
    kinds = dict(_fields(_inner(parts[2]))) if 2 in parts else {}
    if 1 not in kinds:
        return name, "no tensor"
    tensor = dict(_fields(_inner(kinds[1])))
    axes = []
    for number, axis in _fields(_inner(tensor[2])) if 2 in tensor else ():
        if number == 1:
            found = dict(_fields(_inner(axis)))
            axes.append(str(_number(found[1])) if 1 in found else _text(found[2]) if 2 in found else "?")
    label = TYPES.get(_number(tensor.get(1, 0)), ("unknown", 0))[0]
    return name, f"{label} [{', '.join(axes)}]"


def _fields(data: Buffer) -> Iterator[tuple[int, Value]]:
    """`(field number, value)` of a message; a length-delimited value is a view into it."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field without a number")
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + length > len(data):
            raise ValueError("it is truncated")
        yield number, data[position : position + length]
        position += length


def _varint(data: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: Buffer) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _inner(value: Value) -> Buffer:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def _text(value: Value) -> str:
    return bytes(_inner(value)).decode()


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number was expected")
    return value
