"""Runs shell steps of a CI pipeline, with `qwen3-export` on the path."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cli.helpers import COMMAND

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> dict[str, Any]:
    """Load a YAML file of this repository; `on`, true in YAML 1.1, stays `on`."""
    values: dict[Any, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in values.items()}


def summary_of(folder: Path) -> Path:
    """The file to which a step may append its summary."""
    return folder / "summary.md"


def run_step(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one step's script with the shell that GitHub uses; `qwen3-export` is this checkout's."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "qwen3-export").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{COMMAND[2]}" "$@"\n')
    (tools / "qwen3-export").chmod(0o755)
    github = {"CI": "true", "GITHUB_WORKSPACE": str(folder), "GITHUB_STEP_SUMMARY": str(summary_of(folder))}
    github |= {name: str(folder / name.lower()) for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH")}
    shared = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment: Mapping[str, str] = {**os.environ, **shared, **github, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=_one_core
    )


def _one_core() -> None:
    """Limit a step to one core.

    Beside other work, threads that wait for each other take many times as long.
    """
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
