"""Chat templates and patterns of other people, run in a process under limits.

    this process                          the child, started at the first call
    confined(render)(template, values) →  8 bytes length │ JSON arguments
                                       ←  8 bytes length │ JSON {"value": …} or {"error": "…"}

A template can loop for ever or fill the memory, and a regular expression can take longer than anybody waits. Python
cannot stop either from inside the process, but the kernel can stop a child: each call has a timer of processor time,
and the child's address space is limited.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, BinaryIO

SECONDS, MEMORY = 10.0, 512 << 20
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from qwen3_export.core.confined import serve; serve()"
)
_EXIT_MEMORY = 9


class ConfinedError(Exception):
    """A call failed in the child: an error, or a limit."""


class Confined:
    """A module's function, called in the child; arguments and result are JSON."""

    def __init__(self, module: str, function: str) -> None:
        self._call, self._lock = (module, function), threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(self, *arguments: Any) -> Any:
        """The function's result; ConfinedError when it fails or meets a limit."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                _send(child.stdin, list(arguments))
                answer = _receive(child.stdout)
            except (OSError, EOFError):
                raise ConfinedError(self._cause()) from None
            except BaseException:
                self._end()  # an interrupted call leaves an answer in the pipe
                raise
        if "error" in answer:
            raise ConfinedError(answer["error"])
        return answer["value"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():
            settings = (json.dumps(sys.path), *self._call, str(SECONDS))
            # A session of its own: Ctrl-C is for us to handle.
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, *settings],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._owner = os.getpid()
            atexit.register(self._end)
        return self._child

    def _cause(self) -> str:
        """Why the child ended."""
        assert self._child is not None
        code = self._child.wait()
        self._child = None
        if code == -signal.SIGVTALRM:
            return f"it takes more than {SECONDS:g} s"
        return f"it takes more than {MEMORY >> 20} MiB" if code == _EXIT_MEMORY else f"its process ended with {code}"

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()


@cache
def confined(function: Callable[..., Any]) -> Confined:
    """The function as a call to a child process of its own."""
    return Confined(function.__module__, function.__qualname__)


def serve() -> None:
    """The child: answer calls until its input ends."""
    module, name, seconds = sys.argv[2:5]
    inward, outward = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    function = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            _send(outward, _answer(function, _receive(inward), float(seconds)))


def _answer(function: Callable[..., Any], arguments: list[Any], seconds: float) -> dict[str, Any]:
    # When the time is up the signal ends the process, even in the middle of C code.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return {"value": function(*arguments)}
    except MemoryError:
        os._exit(_EXIT_MEMORY)
    except RecursionError:
        return {"error": "it is nested too deep"}
    except Exception as error:  # a foreign program can fail in every way
        return {"error": (str(error).splitlines() or [type(error).__name__])[0][:500]}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _send(stream: BinaryIO | Any, value: Any) -> None:
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    length = int.from_bytes(head, "little")
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return json.loads(data)
