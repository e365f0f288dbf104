"""The manifest `qwen3-export.json`, and the hashes in it.

It says what an output is and what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from qwen3_export import __version__
from qwen3_export.core.files import read_object
from qwen3_export.core.model_card import write_card
from qwen3_export.errors import InputError

T = TypeVar("T")

MANIFEST = "qwen3-export.json"
_PIECE = 16 << 20
_KINDS: dict[str, tuple[type, ...]] = {
    "tensors": (dict,),
    "layout": (str,),
    "source": (dict,),
    "experts": (dict, type(None)),
}
# In a partial folder: what is in here was written by a run of ours and may be removed by the next.
MARKER = ".qwen3-export-partial"


def sha256_file(*paths: Path) -> str:
    """Hex digest of a file's bytes, or of several files' one after the other.

    The pieces are large, since each waits for Python's lock.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(max(1, min(_PIECE, os.fstat(file.fileno()).st_size))))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def beside(work: Callable[[], T]) -> Future[T]:
    """Start some work in a thread of its own.

    A command that fails meanwhile does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def sha256_text(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(values: Any) -> str:
    """The one JSON style of our files: sorted nowhere, indented, newline at the end."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def write_manifest(folder: Path, kind: str, values: dict[str, Any]) -> None:
    """Write `qwen3-export.json`, which says what a folder is, and its model card."""
    text = to_json({"kind": kind, "qwen3_export": __version__, **values})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    write_card(folder, kind, values)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `qwen3-export.json`, an empty dict when the folder has none.

    Raises InputError when it is damaged.
    """
    path = folder / MANIFEST
    values = read_object(path, hint="copy the folder again") if os.path.lexists(path) else {}
    for key, kinds in _KINDS.items():
        if key in values and not isinstance(values[key], kinds):
            raise InputError(f"{path}: {key} is {type(values[key]).__name__}, {kinds[0].__name__} was expected")
    return values


def manifest_text(folder: Path, manifest: Mapping[str, Any], *keys: str) -> str:
    """A text that stands in a manifest under some keys.

    Raises InputError when it does not.
    """
    value: Any = manifest
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str):
        raise InputError(f"{folder / MANIFEST}: {'.'.join(keys)} is no text", "copy the folder again")
    return value


def file_list(folder: Path, digests: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """`[{path, bytes, sha256}]` of every file below a folder, sorted by path.

    `digests` are hashes that are known already, by path.
    """
    found, known = [], digests or {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            name = str(path.relative_to(folder))
            digest = known.get(name) or sha256_file(path)
            found.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
    return found
