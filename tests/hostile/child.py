"""Runs a command line in a forked child, in milliseconds, since imports are done.

The parent imports the heavy libraries but computes nothing, so that it has no threads, which a fork would lose.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS, WALL_SECONDS = 30, 180
_MEMORY = 6 << 30
_PRELOADED = (
    *("torch", "numba", "onnxruntime", "onnx_ir", "onnx", "gguf", "xllamacpp", "tokenizers", "jinja2", "yaml", "rich"),
    *("qwen3_export.cli.solve", "qwen3_export.cli.ship", "qwen3_export.cli.prove", "qwen3_export.cli.bench"),
    *("qwen3_export.cli.recipes", "qwen3_export.cli.demo"),
    *("qwen3_export.solve.quantize", "qwen3_export.ship.onnx", "qwen3_export.ship.gguf", "qwen3_export.prove.validate"),
    *("qwen3_export.prove.original", "qwen3_export.run.generate", "qwen3_export.model.decoder"),
    *("qwen3_export.run.ort", "qwen3_export.run.llamacpp", "qwen3_export.run.torch"),
)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, −signal, or None when still running."""

    code: int | None
    out: str
    err: str
    seconds: float


def preload() -> None:
    """Import everything that commands import, once."""
    for name in _PRELOADED:
        importlib.import_module(name)


def run_child(
    command: Sequence[object],
    folder: Path,
    env: Mapping[str, str | None] | None = None,
    setup: Callable[[], None] | None = None,
    send: int | None = None,
    when: Callable[[], bool] | None = None,
) -> Outcome:
    """Run a command line in `folder`; `send` a signal as soon as `when` holds."""
    preload()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        begun, begins = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become(command, folder, env or {}, setup, out.fileno(), err.fileno(), begins)
        os.close(begins)
        os.read(begun, 1)
        os.close(begun)
        code = _wait(pid, send, when)
        return Outcome(code, _text(out), _text(err), time.monotonic() - started)


def _become(
    command: Sequence[object],
    folder: Path,
    env: Mapping[str, str | None],
    setup: Callable[[], None] | None,
    out: int,
    err: int,
    begins: int,
) -> None:
    """Run as the child: `main`, and the interpreter's own end with its streams."""
    code = 70
    try:
        os.setpgid(0, 0)
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))
        sys.stdin = os.fdopen(0, closefd=False)
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if setup:
            setup()
        code = _main([str(part) for part in command], begins)
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(code)


def _main(arguments: list[str], begins: int) -> int:
    from qwen3_export.cli import main

    # From here on signals may come: handlers are set, or are about to be.
    os.write(begins, b"x")
    os.close(begins)
    sys.argv = ["qwen3-export", *arguments]
    try:
        main()
        code: object = 0
    except SystemExit as end:
        code = end.code
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        return 120  # the interpreter's exit code for it
    return code if isinstance(code, int) else 0 if code is None else 1


def _wait(pid: int, send: int | None, when: Callable[[], bool] | None) -> int | None:
    end = time.monotonic() + WALL_SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _kill(pid)
            return os.waitstatus_to_exitcode(status)
        if send is not None and (when is None or when()):
            os.kill(pid, send)
            send = None
        time.sleep(0.002)
    _kill(pid)
    os.waitpid(pid, 0)
    return None


def _kill(pid: int) -> None:
    """Kill what is left of the child's process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _text(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return file.read(1 << 20).decode("utf-8", "replace")  # type: ignore[attr-defined]
