"""A result stays a result: closed and narrow streams change no exit code, and no stream a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import hashes, names

_SHELL = f"{sys.executable} -c 'from qwen3_export.cli import main; main()'"


def _shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, capture_output=True, cwd=cwd, env={**os.environ, **env}, timeout=120, check=False)


@pytest.mark.parametrize("arguments", ["recipes list", "recipes show rtn-w4a16-g32", "--help", "recipes list --json"])
def test_reader_that_leaves_early(arguments: str, tmp_path: Path) -> None:
    found = _shell(f"{_SHELL} {arguments} | head -c 1", tmp_path)
    assert (found.returncode, found.stderr) == (0, b"")
    gone = _shell(f"{_SHELL} {arguments} | true", tmp_path)
    assert (gone.returncode, gone.stderr) == (0, b"")


def test_failed_gate_is_the_only_one(made: dict[str, Path], tmp_path: Path) -> None:
    common = f"{_SHELL} validate {made['onnx']} --reference {made['reference']} -q"
    assert _shell(f"{common} | true", tmp_path).returncode == 0
    assert _shell(f"{common} --max-kl 0 | true", tmp_path).returncode == 1


@pytest.mark.parametrize(
    "redirection", ["<&-", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"]
)
def test_export_under_odd_streams(redirection: str, made: dict[str, Path], tmp_path: Path) -> None:
    found = _shell(f"{_SHELL} gguf {made['quantized']} --output out {redirection}", tmp_path)
    assert found.returncode == (4 if redirection.startswith(">/dev/full") else 0)
    assert b"Traceback" not in found.stderr
    assert hashes(tmp_path / "out") == hashes(made["gguf"])
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("arguments", ["recipes list --json", "recipes show rtn-w4a16-g32", "--version", "plan --help"])
def test_lost_result_is_an_error(arguments: str, tmp_path: Path) -> None:
    """Whoever redirects stdout relies on the exit code, not on a line on stderr."""
    found = _shell(f"{_SHELL} {arguments} >/dev/full", tmp_path)
    error, hint = found.stderr.decode().splitlines()
    assert found.returncode == 4
    assert error == "error: the result could not be written to stdout: No space left on device"
    assert hint.startswith("hint: free some room")


def test_lost_result_of_a_limited_file(tmp_path: Path) -> None:
    found = _shell(f"ulimit -f 0; {_SHELL} recipes list --json >out", tmp_path)
    assert (found.returncode, (tmp_path / "out").read_bytes()) == (4, b"")
    assert found.stderr.startswith(b"error: the result could not be written to stdout: File too large\n")


def test_code_of_a_failed_command_stays(made: dict[str, Path], tmp_path: Path) -> None:
    gate = f"{_SHELL} validate {made['onnx']} --reference {made['reference']} -q --max-kl 0 --json >/dev/full"
    found = _shell(gate, tmp_path)
    assert found.returncode == 1
    assert found.stderr == b"warning: the result could not be written to stdout: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_every_encoding(encoding: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Letters that it lacks are spelled out; JSON stays JSON."""
    odd = tmp_path / "Ü深"
    odd.symlink_to(made["onnx"])
    command = f"{_SHELL} validate {odd.name} --reference {made['reference']}"
    table = _shell(command, tmp_path, PYTHONIOENCODING=encoding)
    assert table.returncode == 0, table.stderr
    assert b"onnxruntime" in table.stdout
    values = json.loads(_shell(f"{command} --json", tmp_path, PYTHONIOENCODING=encoding).stdout.decode(encoding))
    assert Path(values["results"][0]["artifact"]).name == odd.name


@pytest.mark.parametrize("columns", ["abc", "0", "-5", "9" * 40, "", "٣"])
def test_odd_widths(columns: str, tmp_path: Path) -> None:
    found = _shell(f"{_SHELL} recipes list", tmp_path, COLUMNS=columns)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"rtn-w4a16-g32" in found.stdout
