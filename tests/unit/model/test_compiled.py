"""Machine code that is kept on the disk follows every module it was made of."""

import os
import subprocess
import sys
from pathlib import Path

CALLED = """
from qwen3_export.model.compiled import compiled

@compiled
def step(x):
    return x + {step}
"""
CALLER = """
from callee import step
from qwen3_export.model.compiled import compiled

@compiled
def twice(x):
    return step(step(x))

print(twice(1), sum(twice.stats.cache_hits.values()))
"""


def write(folder: Path, step: int) -> None:
    (folder / "callee.py").write_text(CALLED.format(step=step))
    (folder / "caller.py").write_text(CALLER)


def run(folder: Path) -> list[str]:
    """What a process of its own computes, and how much machine code it found."""
    done = subprocess.run(
        [sys.executable, "-c", "import caller"],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_it_is_made_anew_when_a_called_module_changes(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert run(tmp_path) == ["3", "0"]
    assert run(tmp_path) == ["3", "1"]
    write(tmp_path, 10)
    assert run(tmp_path) == ["21", "0"]
