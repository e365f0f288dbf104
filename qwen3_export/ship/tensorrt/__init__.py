"""TensorRT folders: a standard Q/DQ ONNX and the plan built from it ahead of time.

    model.onnx + model.onnx.data   ai.onnx operators only, also runs in ONNX Runtime
    model.plan                     for the compute capabilities named in engine.json, and no others
    engine.json                    engine, version, capabilities, shape profile, hash of the source

TensorRT-RTX compiles without a GPU; its kernels are specialised on the device. Building happens in
a child process: the compiler writes to stderr on its own, and a crash must not take us with it.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import file_list, to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError, MissingRuntimeError, ResourceError, UnsupportedError
from qwen3_export.ship.exactness import cast_errors
from qwen3_export.ship.onnx import size as onnx_size
from qwen3_export.ship.onnx import write_graph
from qwen3_export.ship.onnx.target import DATA, MODEL, Files, choose
from qwen3_export.ship.result import check_schemes, exactness, export_result, not_integer, provenance

PLAN, ENGINE = "model.plan", "engine.json"
MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INSTALL = {"rtx": "pip install 'qwen3-export[tensorrt]'", "trt": "pip install tensorrt (on a machine with its GPU)"}
# Bit of each compute capability in a TensorRT-RTX plan's header.
CAPABILITIES = {"7.5": 0x01, "8.0": 0x02, "8.6": 0x04, "8.9": 0x08, "12.0": 0x10, "12.1": 0x20}
# A plan may store constants of its own, and rounds sizes up; expanded 4-bit weights would quadruple.
_EXPANDED, _SLACK_BYTES = 1.02, 64 << 10
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
# A plan's own part beside the weights, in all and per block (measured with 1.7; the capabilities add nothing to it).
_ENGINE_BYTES, _BLOCK_BYTES, _QUANTIZED_BLOCK_BYTES = 1_120_000, 753_000, 1_020_000


@dataclass(frozen=True)
class Profile:
    """Shapes that the plan accepts: prompts up to `max_prompt`, caches up to `max_context`, one sequence."""

    max_prompt: int
    max_context: int


def supports(scheme: QuantScheme) -> str | None:
    """Why TensorRT cannot hold a scheme, or None when it can."""
    if reason := not_integer(scheme):
        return reason
    if scheme.signed_scales:
        return "TensorRT takes no negative scales: leave signed_scales off"
    if not scheme.symmetric:
        return "TensorRT takes no zero points"
    if scheme.num_bits != 4 or scheme.strategy != "group":
        return "only 4-bit groups are exported to TensorRT so far"
    if scheme.group_size not in (16, 32, 64, 128):
        return f"TensorRT takes blocks of 16, 32, 64 or 128, not {scheme.group_size}"
    return None


def export_tensorrt(
    checkpoint: Checkpoint,
    output: Path,
    engine: str = "rtx",
    capabilities: Sequence[str] = DEFAULT_CAPABILITIES,
    precision: str = "fp16",
    profile: Profile | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the ONNX, build the plan and check it; returns the result that `--json` prints.

    Raises MissingRuntimeError without the engine's library, UnsupportedError when the codes or the
    capabilities do not fit, ResourceError when the builder is killed for memory.
    """
    started, progress = time.monotonic(), progress or Progress()
    check_request(checkpoint, engine, capabilities, precision)
    context = checkpoint.config.max_position
    profile = profile or Profile(min(1024, context), min(4096, context))
    inexact = cast_errors(checkpoint, precision)
    with staged_folder(output, force, inputs=[checkpoint.folder]) as folder:
        write_graph(checkpoint, folder, choose("standard", precision=precision), Files(), progress)
        with progress.bar("build plan", 1) as tick:
            built = _build(folder, engine, capabilities, profile)
            tick()
        if engine == "rtx":
            check_header(folder / PLAN, built["version"], capabilities)
            check_weights(folder)
        origin = provenance(checkpoint)
        described = {
            "engine": engine,
            "version": built["version"],
            "compute_capabilities": list(capabilities) if engine == "rtx" else "this device",
            "precision": precision,
            "profile": asdict(profile),
            "source_sha256": origin["source"]["sha256"],
        }
        (folder / ENGINE).write_text(to_json(described), encoding="utf-8")
        for path in checkpoint.sidecars():
            shutil.copyfile(path, folder / path.name)
        write_manifest(folder, "tensorrt", {**origin, **described, **exactness(inexact)})
        files = file_list(folder)
    result = export_result(output, files, checkpoint, inexact, started)
    plan_bytes = next(item["bytes"] for item in files if item["path"] == PLAN)
    result["bits_per_weight"] = 8 * plan_bytes / checkpoint.config.num_parameters
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result["peak_rss_bytes"] = max(result["peak_rss_bytes"], children)
    return result


def check_request(checkpoint: Checkpoint, engine: str, capabilities: Sequence[str], precision: str) -> None:
    """Everything that can be known before the long work."""
    if engine not in MODULES:
        raise InputError(f"--engine {engine}: one of {', '.join(MODULES)} was expected")
    if precision not in ("fp16", "bf16"):
        raise InputError(f"--precision {precision}: fp16 or bf16 was expected")
    unknown = [name for name in capabilities if name not in CAPABILITIES]
    if unknown or not capabilities:
        raise InputError(f"--sm {' '.join(unknown) or 'without a value'}: known are {', '.join(CAPABILITIES)}")
    if checkpoint.config.sparse_layers:
        raise UnsupportedError(
            f"{checkpoint.name}: a mixture of experts cannot be exported to TensorRT: its experts become a loop over "
            "the chosen ones, which TensorRT does not take",
            "`qwen3-export onnx` and `gguf` export it",
        )
    check_schemes(checkpoint, supports, "TensorRT")
    if "7.5" in capabilities and (checkpoint.schemes or precision == "bf16"):
        raise UnsupportedError("--sm 7.5 has neither int4 nor bf16 kernels", "use 8.0 or later, or fp16 weights")
    if importlib.util.find_spec(MODULES[engine]) is None:
        raise MissingRuntimeError(f"--engine {engine} needs the {MODULES[engine]} package", INSTALL[engine])


def planned_bytes(checkpoint: Checkpoint, precision: str = "fp16") -> int:
    """Size of the folder that an export would write, from shapes alone: ONNX, and plan with the same weights."""
    block = _QUANTIZED_BLOCK_BYTES if checkpoint.schemes else _BLOCK_BYTES
    plan = onnx_size.weight_bytes(checkpoint, precision) + _ENGINE_BYTES + block * checkpoint.config.num_layers
    return onnx_size.planned_bytes(checkpoint, precision) + plan


def _build(folder: Path, engine: str, capabilities: Sequence[str], profile: Profile) -> dict[str, Any]:
    """Run `ship.tensorrt.build` in a process of its own."""
    request = {
        "module": MODULES[engine],
        "onnx": str(folder / MODEL),
        "plan": str(folder / PLAN),
        "capabilities": list(capabilities) if engine == "rtx" else [],
        **asdict(profile),
    }
    command = [sys.executable, "-m", "qwen3_export.ship.tensorrt.build", json.dumps(request)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == -9:
        raise ResourceError("the TensorRT builder was killed: it needs about four times the ONNX in memory")
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnsupportedError(f"the TensorRT builder failed ({reason})") from None
    if "error" in answer:
        if answer["kind"] == "resource":
            raise ResourceError(answer["error"], "free some room, or use a machine with more of it")
        raise UnsupportedError(f"TensorRT: {answer['error']}")
    return answer


def check_header(path: Path, version: str, capabilities: Sequence[str]) -> None:
    """Compare a TensorRT-RTX plan's header with what was asked for; UnsupportedError when it differs."""
    with path.open("rb") as file:
        header = file.read(64)
    size = int.from_bytes(header[16:24], "little")
    found = ".".join(str(number) for number in header[24:28])
    mask = int.from_bytes(header[32:40], "little")
    wanted = sum(CAPABILITIES[name] for name in set(capabilities))
    if header[:4] != b"vtrt" or size != path.stat().st_size or found != version or mask != wanted:
        raise UnsupportedError(
            f"{path.name}: header says {size} bytes, version {found}, capabilities {mask:#x}; "
            f"{path.stat().st_size} bytes, version {version}, capabilities {wanted:#x} were expected"
        )


def check_weights(folder: Path) -> None:
    """Raise UnsupportedError when the plan holds clearly more weight bytes than its ONNX: codes were expanded."""
    with (folder / PLAN).open("rb") as file:
        file.seek(56)
        stored = int.from_bytes(file.read(8), "little")
    given = (folder / DATA).stat().st_size
    if stored > _EXPANDED * given + _SLACK_BYTES:
        raise UnsupportedError(
            f"the plan has {stored} bytes of weights, its ONNX {given}: TensorRT expanded quantized weights",
            "use a group_size of 32, 64 or 128 that is smaller than the matrices",
        )
