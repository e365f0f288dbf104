"""As containers run it: another user without a home, an installation that cannot be written, no cache for kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.helpers import COMMAND, Outcome, names, refused

_NO_USER = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", "NUMBA_CACHE_DIR")


def _stranger() -> list[str]:
    """A prefix for a command: a user whom the system does not know, who may read everything and write nothing else.

    Who is not root stays who he is, and has no home.
    """
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    only = "+dac_read_search"
    sets = (f"--inh-caps=-all,{only}", f"--ambient-caps=-all,{only}", f"--bounding-set=-all,{only}")
    return ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *sets]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that everyone may write to."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    return tmp_path


def _run(place: Path, *arguments: object, **env: str) -> Outcome:
    # Kernels that the tests' own runs keep beside the source would be found there.
    environment = {name: value for name, value in os.environ.items() if name not in _NO_USER}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [*_stranger(), *COMMAND, *map(str, arguments)]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=place, env=environment, timeout=300, check=False
    )
    return Outcome(process.returncode, process.stdout, process.stderr)


def test_the_main_job_runs(model: Path, place: Path) -> None:
    short = ("--samples", "4", "--sequence-length", "32")
    for command in (
        ("quantize", model, "--recipe", "gptq-w4a16-g32", *short, "--output", "quantized"),
        ("onnx", "quantized", "--output", "onnx"),
        ("gguf", "quantized", "--output", "model.gguf"),
        ("run", "model.gguf", "--prompt", "hello", "--max-new-tokens", "2"),
    ):
        outcome = _run(place, *command)
        assert outcome.code == 0, outcome.err
    assert names(place) == ["model.gguf", "onnx", "quantized"]


def test_a_hub_id_needs_a_place_for_its_files(place: Path) -> None:
    outcome = _run(place, "inspect", "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1")
    if _stranger():
        refused(outcome, 3, "Qwen/Qwen3-0.6B", "HF_HOME")
    assert outcome.code == 3
    refused(_run(place, "inspect", "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1", HF_HOME=str(place / "hub")), 3, "network")


def test_a_place_that_cannot_be_written_is_named_before_the_work(made: dict[str, Path], tmp_path: Path) -> None:
    if not _stranger():
        pytest.skip("needs root, to become somebody else")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    common = ("validate", made["onnx"], "--reference", made["reference"])
    refused(_run(closed, *common, "--report", closed / "report"), 2, "Permission denied", "closed")
    refused(_run(closed, "onnx", made["quantized"], "--output", closed / "a" / "onnx"), 2, "Permission denied")
    assert names(closed) == []
