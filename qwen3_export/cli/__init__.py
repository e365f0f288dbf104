"""The command line: the only place that prints or exits.

One file per group of commands.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from qwen3_export.cli.streams import finish_streams, steady_streams
from qwen3_export.cli.tables import plain
from qwen3_export.core.disk import FULL, disk_of
from qwen3_export.core.memory import HINT, lacks_memory
from qwen3_export.core.process import STOPPING
from qwen3_export.errors import ExportError, InputError, InputWarning

_EXIT_INTERRUPTED = 130
_EXIT_RESOURCES = 4
_EXIT_INPUT = 2
_GOES_ON = "finished blocks are kept in {}: repeat the command to go on"
_AGAIN = "nothing was written: repeat the command to start over"
_USAGE = "`qwen3-export COMMAND --help` shows the usage"
_TOO_LARGE = "raise the limit (`ulimit -f unlimited`), or write to a file system that holds larger files"
_WHOLE = "{} was finished before that, and is whole"
# Commands that write no files.
_READING = ("run", "inspect", "plan")
# Suffixes of the folders from which an interrupted `quantize`, or export with a recipe, goes on.
_KEPT = (".partial", ".quantized.partial")


def main() -> None:
    """Entry point of `qwen3-export`: run a command, print expected failures as one line."""
    started = time.time()
    try:
        steady_streams()
        sys.unraisablehook = _interrupt_again
        for number in STOPPING:
            # A signal that is ignored already, as under nohup, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        code = run(sys.argv[1:])
        # From here on a signal ends the process as the system does, without a traceback.
        for number in (signal.SIGINT, *STOPPING):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    except KeyboardInterrupt as error:
        code = _report(error, sys.argv[1:], started)
    code = finish_streams(code)
    # Spares the garbage collection at exit, a fifth of a second where torch was imported.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    started = time.time()
    try:
        import typer.main

        from qwen3_export.cli.commands import app

        _check_utf8(arguments)
        with _told_warnings(quiet=bool({"-q", "--quiet"} & set(arguments))):
            code = typer.main.get_command(app).main(arguments, prog_name="qwen3-export", standalone_mode=False)
        if code == _EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # which typer turned into this exit code
    except BaseException as error:
        if any(argument in ("-v", "--verbose") for argument in arguments) and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _report(error, arguments, started)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _told_warnings(quiet: bool) -> Iterator[None]:
    """Print each InputWarning once, as a line `warning: …`; others as Python does."""
    with warnings.catch_warnings():
        usual, told = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, InputWarning):
                usual(message, category, *place, **more)
            elif not quiet and str(message) not in told:
                told.add(str(message))
                print(plain(f"warning: {message}", sys.stderr), file=sys.stderr)

        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show
        yield


def _check_utf8(arguments: list[str]) -> None:
    """Refuse arguments that are not UTF-8.

    Python decodes their bytes to lone surrogates, which no tokenizer, manifest or JSON takes.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            option = f"{before} " if before.startswith("-") else ""
            raise InputError(f"{option}{argument!a}: not valid UTF-8", "write it in UTF-8") from error


def _report(error: BaseException, arguments: Sequence[str] = (), started: float = math.inf) -> int:
    """Print `error: …` and `hint: …`, and return the exit code.

    `started` is when the command began, in seconds since 1970.
    """
    if isinstance(error, ExportError):
        return _say(str(error), error.hint, error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The error of a bare command has the help as its text.
        print(f"{error}\n", file=sys.stderr)
        return _say("Missing command.", _USAGE, _EXIT_INPUT)
    usage = _usage_message(error)
    if usage is not None:
        return _say(usage, _USAGE, _EXIT_INPUT)
    if _interrupted(error):
        return _say("interrupted", _after_interrupt(arguments, started), _EXIT_INTERRUPTED)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _say("no more threads may be started", "give fewer --threads, or raise the limit", _EXIT_RESOURCES)
    if isinstance(error, MemoryError | RuntimeError | ImportError | OSError) and lacks_memory(error):
        reason = str(error).strip().partition("\n")[0]
        return _say("out of memory" + (f" ({reason})" if reason else ""), HINT, _EXIT_RESOURCES)
    if isinstance(error, OSError):
        if error.errno == errno.EFBIG:
            return _say(f"a file may not get as large{_where(error)}{_on(error)}", _TOO_LARGE, _EXIT_RESOURCES)
        if error.errno in FULL:
            return _say(f"the disk is full{_where(error)}{_on(error)}", _full_disk_hint(arguments), _EXIT_RESOURCES)
        if error.errno is not None:
            return _say(f"{error.strerror}{_where(error)}", None, _EXIT_INPUT)
    if isinstance(error, SystemExit):
        raise error
    hint = "this is a bug of qwen3-export: please report it with the traceback, which --verbose shows"
    return _say(f"unexpected {type(error).__name__}: {error}", hint, _EXIT_INPUT)


def _after_interrupt(arguments: Sequence[str], started: float) -> str:
    """What an interrupted command has kept, and what to do next."""
    if arguments and arguments[0] in _READING:
        return "nothing was to be written"
    for output in _outputs(arguments):
        found = max(map(_appeared, [Path(output), *Path(output).parent.glob(f"{Path(output).stem}-00001-of-*.gguf")]))
        if found >= started:
            return _WHOLE.format(output)
        if kept := _kept(output):
            return _GOES_ON.format(kept)
    return _AGAIN


def _kept(output: str) -> str | None:
    """The folder from which a stopped run goes on, if there is one."""
    return next((f"{output}{ending}" for ending in _KEPT if os.path.lexists(f"{output}{ending}")), None)


def _outputs(arguments: Sequence[str]) -> Iterator[str]:
    """What a command line names as its outputs, in every spelling."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if before in ("-o", "--output", "--report"):
            yield argument
        elif name in ("--output", "--report") and value:
            yield value
        elif argument.startswith("-o") and len(argument) > 2:
            yield argument[2:]


def _appeared(path: Path) -> float:
    """When a file or folder got its name, in seconds since 1970.

    Outputs get theirs when they are complete. 0 where there is none.
    """
    return path.lstat().st_ctime if os.path.lexists(path) else 0.0


def _interrupted(error: BaseException) -> bool:
    """Whether a signal ended the command.

    Native code that runs on after a KeyboardInterrupt raises a SystemError caused by it.
    """
    cause = error.__cause__ if isinstance(error, SystemError) else error
    return isinstance(cause, KeyboardInterrupt) or type(error).__name__ == "Abort"


def _usage_message(error: BaseException) -> str | None:
    """Message of a usage error, None for other errors.

    Classes are compared by name, since typer may carry its own copy of click.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"UsageError", "ClickException"} and hasattr(error, "format_message"):
        return str(error.format_message()).replace("\n", " ")
    return None


def _where(error: OSError) -> str:
    # When a copy fails, the second name is the file being written.
    name = error.filename2 or error.filename
    return f": {name}" if name else ""


def _on(error: OSError) -> str:
    """The file system that an error's file lies on."""
    name = error.filename2 or error.filename
    return f" (on {disk_of(Path(name))})" if isinstance(name, str) else ""


def _full_disk_hint(arguments: Sequence[str]) -> str:
    hint = "free some room and repeat the command"
    if kept := any(map(_kept, _outputs(arguments))):
        hint += ": a quantize run goes on where it stopped"
    if arguments[:1] and arguments[0] in ("quantize", "calibrate", "onnx", "gguf", "tensorrt"):
        hint += f", {'also' if kept else 'or'} with its activations on another disk (--scratch DIR)"
    return hint


def _say(message: str, hint: str | None, code: int) -> int:
    print(plain(f"error: {message.splitlines()[0] if message else 'unknown'}", sys.stderr), file=sys.stderr)
    if hint:
        print(plain(f"hint: {hint}", sys.stderr), file=sys.stderr)
    return code


def _interrupt_again(failure: sys.UnraisableHookArgs) -> None:
    """Repeat an interrupt that Python has ignored, as it does inside callbacks."""
    if issubclass(failure.exc_type, KeyboardInterrupt):
        # A shell starts what runs in the background with it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main_thread = threading.main_thread().ident
        again = threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(failure)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    # A closing terminal or a stopping service sends several signals: later ones must not interrupt the clean-up.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
