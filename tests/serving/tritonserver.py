"""A real tritonserver on loopback, in a virtual environment of its own.

`nvidia-pytriton` brings the server, its python backend and a stub for each Python; the stub imports numpy 1 and what
the artifact's runtime needs. The clients (`tritonclient`) live in the same environment.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
SERVER, CLIENT = "nvidia-pytriton==0.7.0", "tritonclient[http,grpc]==2.73.0"
# Versions that work with numpy 1.
NUMPY = ("numpy<2", "ml_dtypes<0.6")


@dataclass(frozen=True)
class Environment:
    """The server's virtual environment, and the folder of its backends."""

    folder: Path
    backends: Path

    @property
    def packages(self) -> Path:
        """The folder of its packages."""
        return next((self.folder / "lib").glob("python*/site-packages"))

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def make(folder: Path, requirements: str) -> Environment:
    """Install server, clients and requirements."""
    venv.create(folder / "env", with_pip=True)
    made = Environment(folder / "env", folder / "backends")
    pinned = {line.split("==")[0].lower(): line for line in CONSTRAINTS.read_text().split() if "==" in line}
    wanted = [name if "==" in name else pinned.get(name.lower(), name) for name in requirements.split()]
    wanted = [name for name in wanted if not name.startswith(("numpy", "ml_dtypes"))]
    # A module is compiled when it is first imported, which most never are.
    pip = [made.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    for words in ([*NUMPY, *wanted, CLIENT], ["--no-deps", SERVER]):
        done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    server = made.packages / "pytriton" / "tritonserver"
    stubs = server / "python_backend_stubs" / f"{sysconfig.get_python_version()}"
    shutil.copytree(server / "backends" / "python", made.backends / "python")
    for path in stubs.iterdir():
        shutil.copy(path, made.backends / "python" / path.name)
    for path in (server / "bin" / "tritonserver", made.backends / "python" / "triton_python_backend_stub"):
        path.chmod(0o755)
    return made


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(environment: Environment, repository: Path, model: str, log: Path) -> Iterator[tuple[str, str]]:
    """Run the server for a `with` block; yields its HTTP and gRPC addresses."""
    http, grpc = free_port(), free_port()
    libraries = (environment.packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(environment.packages),
    }
    command = [
        *(environment.packages / "pytriton/tritonserver/bin/tritonserver", f"--model-repository={repository}"),
        *(f"--backend-directory={environment.backends}", "--allow-metrics=false", "--allow-gpu-metrics=false"),
        *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, env=variables, stdout=output, stderr=output) as process:
        try:
            _wait(process, f"http://127.0.0.1:{http}/v2/models/{model}/ready", log)
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-4000:])
