"""Runs of the deep model, long enough to be stopped between two blocks."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cli.helpers import start

OPTIONS = ("--recipe", "gptq-w4a16-g32", "--samples", "32", "--sequence-length", "128")
LAYERS = 8


def start_run(model: Path, out: Path) -> subprocess.Popen[str]:
    return start("quantize", model, *OPTIONS, "--output", out)
