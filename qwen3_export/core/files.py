"""Files that other people wrote, read within bounds.

Only regular files of a bounded size are opened, and every parser fails with the same kind of error.

    read_bytes   a regular file's bytes             a pipe or a device is refused, not waited for
    read_text    UTF-8, or what a byte-order mark says; every line ends in a line feed
    read_json    a JSON value: nesting, digits and letters within what the rest of the program can take
    read_yaml    the same of YAML, whose aliases can also stand for more than memory holds

Whatever a parser raises becomes one InputError (or a subclass that the caller names) with the path and the reason.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwen3_export.core.unique_keys import DuplicateKeyError, loads_json, loads_yaml
from qwen3_export.errors import CheckpointError, InputError

Kind = type[InputError]
# Far above any real file of its kind: the largest tokenizer.json has 30 MB.
MOST_BYTES = 256 << 20
_DEEPEST, _MOST_YAML_VALUES = 100, 100_000
# Larger numbers cannot become floats; transformers' "no limit" has 31 digits.
_LARGEST_NUMBER = 10**300
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; OSError for anything else.

    A pipe is refused at once, without waiting for somebody to write into it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(0, f"it is {_KINDS.get(kind, 'no regular file')}, a regular file was expected")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, kind: Kind = InputError, hint: str | None = None, most: int | None = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise kind(f"{path}: it has {size} bytes, at most {most} were expected", hint)
            return file.read()
    except (OSError, ValueError) as error:
        raise kind(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})", hint) from error


def _decode(data: bytes) -> str:
    """Text from bytes: UTF-8 or what a byte-order mark says, any line ends."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, kind: Kind = InputError, hint: str | None = None, most: int | None = MOST_BYTES) -> str:
    """A text file, without its byte-order mark; every line ends in a line feed."""
    data = read_bytes(path, kind, hint, most)
    try:
        return _decode(data)
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not a text file ({error})", "save it as UTF-8") from error


def read_lines(path: Path, kind: Kind = InputError) -> Iterator[str]:
    """The lines of a text file of any size, one by one."""
    try:
        with open_regular(path) as file:
            head = file.read(3)
            file.seek(0)
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
            yield from io.TextIOWrapper(file, encoding)
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not a text file ({error})", "save it as UTF-8") from error
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(data: str | bytes, where: object, kind: Kind = InputError, unique: bool = False) -> Any:
    """A JSON value, refused where nesting, digits or letters go too far.

    With `unique`, for what people write, an object that has a key twice is refused too.
    """

    def read() -> Any:
        text = _decode(data) if isinstance(data, bytes) else data
        values = loads_json(text) if unique else json.loads(text)
        _check_values(values, "\\u" in text)
        return values

    return _parsed(read, where, "valid JSON", kind)


def read_json(path: Path, kind: Kind = InputError, hint: str | None = None, unique: bool = False) -> Any:
    """The value in a JSON file; `unique` as in `parse_json`."""
    return parse_json(read_bytes(path, kind, hint), path, kind, unique)


def read_object(path: Path, kind: Kind = InputError, hint: str | None = None) -> dict[str, Any]:
    """The object in a JSON file."""
    values = read_json(path, kind, hint)
    if not isinstance(values, dict):
        raise kind(f"{path}: a JSON object was expected, found {type(values).__name__}", hint)
    return values


def read_sidecar(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside the tensors, empty when there is none.

    Raises CheckpointError when it is broken.
    """
    return read_object(path, CheckpointError) if os.path.lexists(path) else {}


def read_yaml(path: Path, kind: Kind = InputError) -> Any:
    """The value in a YAML file, plain types alone.

    A mapping that has a key twice is refused.
    """
    text = read_text(path, kind)

    def read() -> Any:
        values = loads_yaml(text)
        _check_values(values, True, _MOST_YAML_VALUES)
        return values

    return _parsed(read, path, "a readable YAML file", kind)


def _parsed(read: Callable[[], Any], where: object, wanted: str, kind: Kind) -> Any:
    try:
        return read()
    except DuplicateKeyError as error:
        raise kind(f"{where}: {error}", "keep one of the two") from error
    except Exception as error:  # parsers raise far more than they document: OverflowError, KeyError, AttributeError …
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"{where}: not {wanted} ({reason})") from error


def _check_values(values: Any, letters: bool, most: int | None = None) -> None:
    """Raise ValueError for values nested too deeply, and for numbers too large.

    With `letters`, text that is not valid UTF-8 is refused too.
    """
    level, depth, count = [values], 0, 0
    while level:
        count += len(level)
        if depth > _DEEPEST or (most is not None and count > most):
            raise ValueError(f"nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {most} values")
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                below += value.values()
                if letters:
                    below += value.keys()
            elif kind is list or kind is tuple or kind is set:
                below += value
            elif kind is str:
                if letters:
                    value.encode()
            elif kind is int and not -_LARGEST_NUMBER < value < _LARGEST_NUMBER:
                raise ValueError("a number of more than 300 digits")
        level, depth = below, depth + 1
