"""Outputs that exist whole or not at all, and `qwen3-export.json`, which says what they are.

OUTPUT.partial   being written, locked by the run that writes it
OUTPUT           appears by one rename, complete and flushed to the disk
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen3_export import __version__
from qwen3_export.errors import InputError

MANIFEST = "qwen3-export.json"
_PIECE = 16 << 20
# In a partial folder: what is in here was written by a run of ours and may be removed by the next.
_MARKER = ".qwen3-export-partial"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces: large ones, since each waits for Python's lock."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(max(1, min(_PIECE, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def beside(work: Callable[[], str]) -> Future[str]:
    """Start some work in a thread of its own; a command that fails meanwhile does not wait for it."""
    future: Future[str] = Future()

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
    """Write `qwen3-export.json`: what the folder is and what it was made from."""
    text = to_json({"kind": kind, "qwen3_export": __version__, **values})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `qwen3-export.json`; an empty dict when the folder has none or it is unreadable."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    _flush(beside)
    beside.replace(path)


def refuse_existing(output: Path, force: bool) -> None:
    """Raise InputError when `output` exists, unless `force` and it is ours (or empty) to replace."""
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise InputError(f"{output} exists already", "choose another place, or --force to replace it")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputError(
            f"{output} is a folder that qwen3-export did not write: it is not replaced", "remove it yourself"
        )


def partial_path(output: Path) -> Path:
    """Where an output is written until it is done."""
    return output.with_name(output.name + ".partial")


@contextmanager
def staged_folder(output: Path, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield the locked `OUTPUT.partial/`; rename it to `OUTPUT` when the block ends well.

    On an error the partial folder is removed, or kept as it stands when `resume` is true. Raises
    InputError when the output exists or when another run holds the folder.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, a folder was expected", "choose another --output")
    refuse_existing(output, force)
    partial = partial_path(output)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, os.O_RDONLY):
        refuse_existing(output, force)
        _claim(partial)
        if not resume:
            clear_partial(partial)
        try:
            yield partial
            (partial / _MARKER).unlink(missing_ok=True)
            _move_into_place(partial, output)
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def staged_file(output: Path, force: bool = False) -> Iterator[Path]:
    """As `staged_folder`, for a single file."""
    output = output.absolute()
    if output.is_dir():
        raise InputError(f"{output} is a folder, a file was expected", "choose another --output")
    refuse_existing(output, force)
    partial = partial_path(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial, os.O_RDWR | os.O_CREAT):
        refuse_existing(output, force)
        try:
            yield partial
            _flush(partial)
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _flush(output.parent)


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Hold an exclusive lock on a file or folder; it dies with the process, however that ends."""
    descriptor = os.open(path, flags, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is writing {path.with_name(path.name.removesuffix('.partial'))}",
                "wait for it, or choose another --output",
            ) from error
        if not path.exists() or os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            raise InputError(f"another run has just finished with {path}", "look at its output, then try again")
        yield
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, output: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush(partial)
    if output.exists():
        replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced) if not replaced.is_symlink() else replaced.unlink()
    else:
        partial.rename(output)
    _flush(output.parent)


def _claim(partial: Path) -> None:
    """Mark a partial folder as ours; InputError when it holds what somebody else put there."""
    ours = any((partial / name).exists() for name in (_MARKER, MANIFEST))
    if not ours and any(partial.iterdir()):
        raise InputError(f"{partial} holds files that qwen3-export did not write", "move them away: it is needed")
    (partial / _MARKER).touch()


def clear_partial(partial: Path) -> None:
    """Empty a claimed partial folder."""
    for path in partial.iterdir():
        if path.name != _MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_list(folder: Path) -> list[dict[str, Any]]:
    """`[{path, bytes, sha256}]` of every file below a folder, sorted by path."""
    return [
        {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MARKER
    ]
