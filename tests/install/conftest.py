"""A wheel from a clean copy of the repository, and an environment outside it.

    wheel ──▶ device  runtimes alone ([ort,llamacpp]): no torch, no onnx
                │
                ▼
              rounder  and numba: rounding to nearest, still no torch
                │
                ▼
              full    every extra, in the same environment

The tests of `device` come first, then those of `rounder`: each adds to the environment of the one before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.helpers import Outcome, call, write_text_model

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the empty folder from which its commands run."""

    folder: Path
    outside: Path

    def run(self, *command: object, timeout: float = 600) -> Outcome:
        """Run a program of the environment, with nothing of the checkout on its paths."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        clean |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{clean['PATH']}", "HF_HUB_OFFLINE": "1"}
        words = [str(self.folder / "bin" / str(command[0])), *map(str, command[1:])]
        done = subprocess.run(
            words, cwd=self.outside, env=clean, capture_output=True, text=True, timeout=timeout, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def cli(self, *arguments: object) -> Outcome:
        """Run the installed command line."""
        return self.run("qwen3-export", *arguments)

    def install(self, wheel: Path, extras: str) -> None:
        """Install the wheel with extras, in the versions that the tests ran with."""
        # A module is compiled when it is first imported, which most never are.
        options = ("--quiet", "--disable-pip-version-check", "--no-compile", "-c", ROOT / "constraints.txt")
        outcome = self.run("python", "-m", "pip", "install", *options, f"{wheel}[{extras}]")
        assert outcome.code == 0, outcome.err

    def has(self, module: str) -> bool:
        """Whether a module can be imported."""
        return self.run("python", "-c", f"import {module}").code == 0


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (base / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, base / "copy" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(base / "dist"), str(base / "copy")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (base / "dist").iterdir()
    return found


@pytest.fixture(scope="session")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    base = tmp_path_factory.mktemp("device")
    (base / "outside").mkdir()
    venv.create(base / "env", with_pip=True)
    made = Environment(base / "env", base / "outside")
    made.install(wheel, "ort,llamacpp")
    return made


@pytest.fixture(scope="session")
def rounder(device: Environment, wheel: Path) -> Environment:
    device.install(wheel, "rtn")
    return device


@pytest.fixture(scope="session")
def full(rounder: Environment, wheel: Path) -> Environment:
    rounder.install(wheel, "solve,onnx,gguf,tensorrt")
    return rounder


@pytest.fixture(scope="session")
def carried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What another machine made and a device gets: artifacts and the original's answers."""
    base = tmp_path_factory.mktemp("carried")
    paths = {
        "source": write_text_model(base / "text-model"),
        "quantized": base / "quantized",
        "onnx": base / "model-onnx",
        "gguf": base / "model.gguf",
        "reference": base / "original.safetensors",
    }
    for command in (
        ("quantize", paths["source"], "--recipe", "rtn-w4a16-g32", "--output", paths["quantized"]),
        ("onnx", paths["quantized"], "--output", paths["onnx"]),
        ("gguf", paths["quantized"], "--output", paths["gguf"]),
        ("reference", paths["source"], "--output", paths["reference"], "--tokens", "512"),
    ):
        outcome = call(*command)
        assert outcome.code == 0, outcome.err
    return paths
