"""Environments of their own for other people's tools, kept for the next run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def environment(name: str, *packages: str, shares: bool = False) -> Path:
    """The folder of an environment's programs, with `packages` from PyPI; made where it is missing.

    With `shares` it also sees what this environment has installed, such as torch. It then lies in this
    environment: pip leaves out what is here already, so it is of no use once this one is gone or another.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qwen3-export-tests"
    cache = Path(sys.prefix) / "test-environments" if shares else user
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of these tests may be installing it
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            if shares:
                (own,) = folder.glob("lib/python*/site-packages")
                (own / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
            command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages]
            subprocess.run(command, check=True, capture_output=True)
            (folder / "done").touch()
    return folder / "bin"
