"""Damage for any file: other JSON values, other bytes, or an odd replacement."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.trial import read_json

# Values that a reader may not expect where it looks for a number, a name, a list or an object.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, -0.0, float("nan"), float("inf")),
    *("", "x", "0", "\x00", "\ud800", "é" * 100, "../../etc/passwd", "a" * 100_000),
    *([], [None], [[]], [1, 2, 3], {}, {"": {}}, {"x": [1]}),
)


def odd(random: Random) -> Any:
    """An unexpected value, or a deep nest."""
    if random.random() < 0.05:
        value: Any = 0
        for _ in range(random.choice((10, 400, 2000))):
            value = [value] if random.random() < 0.5 else {"a": value}
        return value
    return random.choice(ODD)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into a JSON value."""
    found = [path] if path else []
    if len(path) > 12:
        return found
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list):
        items = list(enumerate(values[:50]))
    else:
        return found
    for key, value in items[:400]:
        found += places(value, (*path, key))
    return found


def change_json(random: Random, values: Any) -> str:
    """Change one place of a JSON value; returns what was done, in words."""
    # Mostly at the upper levels, which readers look at.
    path = random.choice(places(values))
    path = path[: random.randint(1, len(path))]
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    key, where = path[-1], "/".join(map(str, path))
    if isinstance(inner, dict) and random.random() < 0.2:
        del inner[key]
        return f"without {where}"
    value = odd(random)
    inner[key] = value
    return f"{where} is {in_words(value)}"


def in_words(value: Any) -> str:
    """The beginning of a value, for a report."""
    try:
        return ascii(value)[:40]
    except RecursionError:
        return "a deep nest"


def dump_json(values: Any) -> bytes:
    """JSON text that may hold NaN, lone surrogates and deep nests."""
    import json
    import sys

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(values).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)
        sys.setrecursionlimit(limit)


TEXTS: dict[str, bytes] = {
    "an empty file": b"",
    "no JSON": b"hello",
    "half of an object": b'{"a": [1, 2',
    "a nest of 100,000": b"[" * 100_000,
    "a nest of objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"model_type": "qwen3"}'.encode("utf-16"),
    "zeros": bytes(4096),
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"x"',
    "null": b"null",
    "twice": b"{}{}",
}


def change_json_file(random: Random, path: Path) -> str:
    """Change a JSON file in one to three places, or replace it."""
    roll = random.random()
    if roll < 0.2:
        what = random.choice(list(TEXTS))
        path.write_bytes(TEXTS[what])
        return f"{path.name} is {what}"
    if roll < 0.25:
        return replace_file(random, path)
    values = read_json(path)
    changes = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if isinstance(values, dict) and values:
            changes.append(change_json(random, values))
    path.write_bytes(dump_json(values))
    return f"{path.name}: {', '.join(changes)}"


def replace_file(random: Random, path: Path) -> str:
    """Replace a file by a folder, a link, a pipe or nothing."""
    kind = random.choice(
        ("a pipe", "/dev/zero", "/dev/full", "a folder", "a loop of links", "a link to nothing", "no one")
    )
    if path.exists():
        path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind.startswith("/dev"):
        path.symlink_to(kind)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "a link to nothing":
        path.symlink_to("absent")
    else:
        return f"{path.name} is not there"
    return f"{path.name} is {kind}"


def change_bytes(random: Random, path: Path, first: int | None = None) -> str:
    """Cut, lengthen or flip bytes of a file, within its `first` bytes if given."""
    data = bytearray(path.read_bytes())
    end = min(first or len(data), len(data))
    how = random.choice(("cut", "longer", "flip", "flip", "zero", "word", "word"))
    at = random.randrange(max(end, 1))
    if how == "cut":
        del data[at:]
    elif how == "longer":
        data += random.randbytes(random.choice((1, 7, 4096)))
    elif how == "flip":
        for _ in range(random.choice((1, 4, 32))):
            data[random.randrange(end)] ^= 1 << random.randrange(8)
    elif how == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    else:
        word = random.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        data[at : at + 8] = word[: len(data[at : at + 8])]
    path.write_bytes(data)
    return f"{path.name}: {how} at {at}"


def commands(
    random: Random, source: Path, out: Path, *, quantized: bool = False
) -> tuple[tuple[object, ...], tuple[Path, ...]]:
    """A command that opens a checkpoint folder, and its outputs."""
    writes: list[tuple[object, ...]] = [("onnx", source), ("gguf", source)]
    if not quantized:
        writes += [("quantize", source, "--recipe", "rtn-w4a16-g32")] * 2
        writes += [("quantize", source, "--recipe", "gptq-w4a16-g32", "--samples", "2", "--sequence-length", "16")]
    choices: list[tuple[tuple[object, ...], tuple[Path, ...]]] = [
        ((*command, "--output", out), (out,)) for command in writes
    ]
    choices += [(("inspect", source), ())] * 3
    choices.append((("run", source, "--prompt", "hi", "--max-new-tokens", "2"), ()))
    choices.append((("reference", source, "--tokens", "64", "--window", "32", "--output", out), (out,)))
    return random.choice(choices)
