"""The plan file: built in a child process, its header and size checked.

The compiler has a process of its own because it writes to stderr, and because a crash must not end this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_export.core.cuda import Gpu
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.memory import check_child, out_of_memory
from qwen3_export.core.plan_folder import PLAN, capability_bits, read_plan_header
from qwen3_export.core.progress import Progress
from qwen3_export.errors import ResourceError, UnsupportedError
from qwen3_export.ship.onnx.target import DATA, MODEL
from qwen3_export.ship.tensorrt.profiles import Shapes

MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
# How many times the ONNX's weight bytes a plan may store. Constants and rounded-up sizes add a little, and a second
# profile may lay small matrices out anew; 4-bit weights expanded to 16 would quadruple the size.
_EXPANDED, _SLACK_BYTES, _SECOND_PROFILE = 1.02, 8 << 10, 1.10


def build_plan(
    folder: Path, engine: str, capabilities: Sequence[str], profiles: Sequence[Shapes], progress: Progress
) -> dict[str, Any]:
    """Build the plan of a folder's ONNX and check it.

    When a second profile makes the plan store weights twice, it is built again with the first profile alone. Returns
    `{version, warnings, peak_rss_bytes, cpu_seconds, seconds, profiles, capability, file}`, `profiles` being their
    number and `file` what engine.json records of the plan's bytes.
    """
    started = time.monotonic()
    with progress.bar("build plan", 1) as tick:
        built = _build(folder, engine, capabilities, profiles)
        if engine == "rtx" and len(profiles) > 1 and stored_share(folder) > _SECOND_PROFILE:
            progress.log("two profiles store weights twice: one is built")
            profiles = profiles[:1]
            built = _build(folder, engine, capabilities, profiles)
        tick()
    if engine == "rtx":
        check_header(folder / PLAN, built["version"], capabilities)
        check_weights(folder, _SECOND_PROFILE if len(profiles) > 1 else _EXPANDED)
    capability = _here() if engine == "trt" else None
    seconds, plan = time.monotonic() - started, folder / PLAN
    file = {"plan_bytes": plan.stat().st_size, "plan_sha256": sha256_file(plan)}
    return {**built, "seconds": seconds, "profiles": len(profiles), "capability": capability, "file": file}


def _here() -> str:
    """The compute capability of this machine's GPU, which classic TensorRT builds for."""
    gpu = Gpu()
    gpu.close()
    return gpu.capability


def _build(folder: Path, engine: str, capabilities: Sequence[str], profiles: Sequence[Shapes]) -> dict[str, Any]:
    """Run `ship.tensorrt.build` in a process of its own."""
    request = {
        "module": MODULES[engine],
        "onnx": str(folder / MODEL),
        "plan": str(folder / PLAN),
        "capabilities": list(capabilities) if engine == "rtx" else [],
        "profiles": profiles,
    }
    command = [sys.executable, "-m", "qwen3_export.ship.tensorrt.build", json.dumps(request)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    check_child("the TensorRT builder", child)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnsupportedError(f"the TensorRT builder failed ({reason})") from None
    if "error" in answer:
        if answer["kind"] == "memory":
            raise out_of_memory("the TensorRT builder", answer["error"])
        if answer["kind"] == "resource":
            raise ResourceError(answer["error"], "free some room, or use a machine with more of it")
        raise UnsupportedError(f"TensorRT: {answer['error']}")
    return answer


def check_header(path: Path, version: str, capabilities: Sequence[str]) -> None:
    """Raise UnsupportedError when a TensorRT-RTX plan's header differs from the request."""
    found, size, wanted = read_plan_header(path), path.stat().st_size, capability_bits(capabilities)
    if (found.magic, found.size, found.version, found.capabilities) != (b"vtrt", size, version, wanted):
        raise UnsupportedError(
            f"{path.name}: header says {found.size} bytes, version {found.version}, capabilities "
            f"{found.capabilities:#x}; {size} bytes, version {version}, capabilities {wanted:#x} were expected"
        )


def stored_share(folder: Path) -> float:
    """Ratio of the plan's weight bytes to the ONNX's."""
    stored = read_plan_header(folder / PLAN).weight_bytes
    return max(0, stored - _SLACK_BYTES) / (folder / DATA).stat().st_size


def check_weights(folder: Path, most: float = _EXPANDED) -> None:
    """Raise UnsupportedError when the plan stores codes expanded to a wider type.

    It then has more than `most` times the weight bytes of its ONNX.
    """
    if (share := stored_share(folder)) > most:
        raise UnsupportedError(
            f"the plan has {share:.2f} times its ONNX's bytes of weights: TensorRT expanded quantized weights",
            "choose a group_size of 32, 64 or 128 that is smaller than the matrices, or strategy: channel",
        )
