"""A virtual environment for every peer, outside of the repository, made when missing.

`peers/<peer>.txt` pins all packages, and pip does not check their requirements: GPTQModel 7.7 asks for a newer torch
than the one that all tools share here, but runs with it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent / "peers"
NAMES = {"gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor", "autoround": "auto-round"}
BUILT_HERE = "gptqmodel"
BUILD_TOOLS = ("setuptools==84.2.1", "wheel==0.48.0")


def cache_folder() -> Path:
    """Where environments, checkpoints and results are kept."""
    return Path(os.environ.get("QWEN3_EXPORT_BENCH", "~/.cache/qwen3-export-bench")).expanduser()


def version(peer: str) -> str:
    """The pinned version of a peer."""
    lines = (PEERS / f"{peer}.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.lower().startswith(f"{NAMES[peer]}=="))


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made when missing or outdated."""
    folder, pins = cache_folder() / peer, PEERS / f"{peer}.txt"
    python, stamp = folder / "bin/python", folder / "installed.sha256"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"installing {peer} {version(peer)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
        # GPTQModel comes as source only: its build needs the installed torch, and newer build tools than Python's.
        subprocess.run([*install, *BUILD_TOOLS], check=True)
        subprocess.run([*install, "-r", without(pins, BUILT_HERE, folder)], check=True)
        if peer == BUILT_HERE:
            subprocess.run([*install, "--no-build-isolation", f"{BUILT_HERE}=={version(peer)}"], check=True)
        stamp.write_text(wanted)
    return python


def without(pins: Path, package: str, folder: Path) -> Path:
    """A copy of the pins that lacks one package."""
    copy = folder / "pins.txt"
    lines = [line for line in pins.read_text().splitlines() if not line.lower().startswith(f"{package}==")]
    copy.write_text("\n".join(lines) + "\n")
    return copy
