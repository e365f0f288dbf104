"""Helpers of the command-line tests: running commands, checking errors, hashing outputs."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from qwen3_export.cli import run
from qwen3_export.core.resources import resource
from qwen3_export.core.schemas import schema
from tests.conftest import tiny_config, write_checkpoint

COMMAND = (sys.executable, "-c", "from qwen3_export.cli import main; main()")
_SIDECARS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of one command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code in (0, 1), self.err
        values = json.loads(self.out)
        assert isinstance(values, dict)
        return values


def call(*arguments: object) -> Outcome:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    if "--json" in arguments and code in (0, 1):
        check_schema(out.getvalue(), *map(str, arguments))
    return Outcome(code, out.getvalue(), err.getvalue())


@cache
def validator(command: str) -> Draft202012Validator:
    """The validator of a command's schema."""
    return Draft202012Validator(schema(command))


def check_schema(text: str, *arguments: str) -> None:
    """Assert that a command's `--json` output follows its schema."""
    command = " ".join(arguments[:2]) if arguments[0] == "recipes" else arguments[0]
    errors = [f"{error.json_path}: {error.message[:300]}" for error in validator(command).iter_errors(json.loads(text))]
    assert not errors, (command, errors)


def reported(outcome: Outcome, command: str) -> dict[str, Any]:
    """The JSON object of a command that ends with an error after its report."""
    check_schema(outcome.out, command)
    values = json.loads(outcome.out)
    assert isinstance(values, dict)
    return values


def start(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command line in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
    )


def run_silently(arguments: list[str], log: str) -> None:
    """Run a command line in this process and end it; the child of `fork`."""
    with open(log, "w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        code = run(arguments)
    os._exit(code)


# What `quantize` imports when it is needed.
_IMPORTED = ("torch", "numba", "ray", "qwen3_export.solve.blocks.block", "qwen3_export.solve.methods.gptq")


def fork(*arguments: object, log: Path | str = os.devnull) -> BaseProcess:
    """Start a command line in a forked process, which has its imports done; its output goes to `log`.

    So a signal can reach the command at a chosen moment of its work.
    """
    context = multiprocessing.get_context("forkserver")
    own = ("qwen3_export.cli", "qwen3_export.solve.quantize", "tests.cli.helpers")
    context.set_forkserver_preload([*own, *_IMPORTED])
    process = context.Process(target=run_silently, args=([str(argument) for argument in arguments], str(log)))
    process.start()
    return process


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Outcome:
    """Wait for a started command line."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """Assert an error's form: its code, `error: …`, perhaps `hint: …`, an empty stdout."""
    assert outcome.code == code, (outcome.code, outcome.err)
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(places) == 1, outcome.err
    tail = lines[places[0] :]
    assert len(tail) == 1 or (len(tail) == 2 and tail[1].startswith("hint: ")), outcome.err
    assert not tail[0].startswith("error: unexpected"), outcome.err
    for word in words:
        assert word in "\n".join(tail), (word, outcome.err)


def names(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def hashes(path: Path) -> dict[str, str]:
    """`{relative path: SHA-256}` of a file or of everything below a folder."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_text_model(folder: Path, **changes: Any) -> Path:
    """A small random model with a tokenizer, whose widths are multiples of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 8192, "max_position_embeddings": 512}
    write_checkpoint(folder, tiny_config(**{**sizes, "eos_token_id": 8187, **changes}))
    for name in _SIDECARS:
        shutil.copyfile(resource("calibration") / "reference-model" / name, folder / name)
    return folder


def finished_blocks(output: Path) -> int:
    """Number of finished blocks that the unfinished run of an output has recorded."""
    try:
        saved = json.loads((output.with_name(f"{output.name}.partial") / "state" / "progress.json").read_text())
    except (OSError, ValueError):
        return 0
    return len(saved["blocks"])


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Poll until a condition holds while a process works on it."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """A file system of `size` bytes at `folder`; PermissionError where none may be mounted."""
    folder.mkdir()
    settings = ",".join([f"size={size}", *options])
    command = ["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk has no byte left."""
    with path.open("wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * piece)
            except OSError:
                continue
