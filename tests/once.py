"""What is made once in a run of the tests, by whichever process asks first."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.outputs import write_atomic


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A new folder that `make` fills, and what it returns; the same for all processes of a run.

    Whoever comes while it is made waits. What `make` returns goes through JSON.
    """
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)
    folder, result = shared / name, shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir(exist_ok=True)
            write_atomic(result, json.dumps(make(folder)))
    return folder, json.loads(result.read_text())
