"""An artifact opened and run in ever more memory, each time in a process of its own.

python -m tests.artifact.starved ARTIFACT, one JSON line per process
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from qwen3_export.errors import ExportError
from qwen3_export.model.decoder import Decoder
from qwen3_export.run.artifact import open_session
from qwen3_export.run.llamacpp.interface import library
from qwen3_export.run.session import RuntimeOptions

LOADED = (onnxruntime, torch, Decoder, library())
# Free address space in MiB. Below the first, a thread of llama.cpp does not even get its variables.
ROOM = (20, 32, 48, 80, 160, 320, 640, 4000)


def starve(room: int) -> None:
    """Let this process map so many MiB more, and no others."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (room << 20),) * 2)


def outcome(artifact: Path, room: int) -> dict[str, object]:
    """What became of it: `ok`, or the error and its exit code."""
    starve(room)
    try:
        session = open_session(artifact, RuntimeOptions(threads=1, context=1024))
        session.prefill(np.arange(900, dtype=np.int32) % 300)
        session.decode(1)
    except ExportError as error:
        return {"room": room, "code": error.exit_code, "text": str(error)}
    except BaseException as error:
        return {"room": room, "code": None, "text": repr(error)}
    return {"room": room, "code": 0, "text": "ok"}


def main() -> None:
    """Fork a process for each amount of memory."""
    for room in ROOM:
        if not (child := os.fork()):
            answer = json.dumps(outcome(Path(sys.argv[1]), room))
            os.write(1, answer.encode() + b"\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"room": room, "code": None, "text": f"status {status}"}), flush=True)


if __name__ == "__main__":
    main()
