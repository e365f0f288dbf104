"""TensorRT folders: a standard Q/DQ ONNX, and the plan built from it.

    model.onnx + model.onnx.data   ai.onnx operators only, also runs in ONNX Runtime
    model.plan                     for the compute capabilities named in engine.json, and no others
    engine.json                    engine, version, capabilities, shape profile, hash of the source

TensorRT-RTX compiles without a GPU; its kernels are specialised on the device. Building happens in
a child process: the compiler writes to stderr on its own, and a crash must not take us with it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import file_list, to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import InputError, MissingRuntimeError, ResourceError, UnsupportedError
from qwen3_export.ship.exactness import cast_errors
from qwen3_export.ship.onnx import TYPES, qdq, write_graph
from qwen3_export.ship.onnx import size as onnx_size
from qwen3_export.ship.onnx.target import DATA, MODEL, Files, choose
from qwen3_export.ship.result import check_schemes, exactness, export_result, onnx_linear_bytes, provenance
from qwen3_export.ship.tensorrt.capabilities import CAPABILITIES, DEFAULT, fitting, supports, too_old
from qwen3_export.ship.tensorrt.cost import build_cost, check_memory
from qwen3_export.ship.tensorrt.profiles import Profile, Shapes, default_profile, prefill_shapes, trtexec_line

PLAN, ENGINE = "model.plan", "engine.json"
MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INSTALL = {"rtx": "pip install 'qwen3-export[tensorrt]'", "trt": "pip install tensorrt (on a machine with its GPU)"}
# A plan may store constants of its own, and rounds sizes up; expanded 4-bit weights would quadruple.
_EXPANDED, _SLACK_BYTES = 1.02, 64 << 10
# A plan's own part beside the weights, in all and per block (measured with 1.7; the capabilities add nothing to it).
_ENGINE_BYTES, _BLOCK_BYTES, _QUANTIZED_BLOCK_BYTES = 1_120_000, 753_000, 1_020_000


def export_tensorrt(
    checkpoint: Checkpoint,
    output: Path,
    engine: str = "rtx",
    capabilities: Sequence[str] | None = None,
    precision: str = "fp16",
    profile: Profile | None = None,
    force: bool = False,
    progress: Progress | None = None,
    onnx_only: bool = False,
) -> dict[str, Any]:
    """Write the ONNX, build the plan and check it.

    Returns the result that `--json` prints. `onnx_only` leaves the plan to its device: the result's `trtexec` is the
    command that builds it there.

    Raises MissingRuntimeError without the engine's library, UnsupportedError when the codes or the
    capabilities do not fit, ResourceError when there is too little memory or the builder is killed for it.
    """
    started, progress = time.monotonic(), progress or Progress()
    profile = profile or default_profile(checkpoint.config)
    capabilities = check_request(checkpoint, engine, capabilities, precision, profile, onnx_only)
    profiles = profiles_of(checkpoint, profile)
    inexact = cast_errors(checkpoint, precision) + scale_errors(checkpoint, precision)
    with staged_folder(output, force, inputs=[checkpoint.folder]) as folder:
        target = replace(choose("standard", precision=precision), flavor="tensorrt")
        write_graph(checkpoint, folder, target, Files(), progress)
        built = None if onnx_only else _built(folder, engine, capabilities, profiles, progress)
        origin = provenance(checkpoint)
        described = {
            "engine": engine,
            "version": built["version"] if built else None,
            "compute_capabilities": _named(engine, capabilities, built),
            "precision": precision,
            "profile": asdict(profile),
            "profiles": len(profiles),
            "source_sha256": origin["source"]["sha256"],
        }
        (folder / ENGINE).write_text(to_json(described), encoding="utf-8")
        for path in checkpoint.sidecars():
            shutil.copyfile(path, folder / path.name)
        write_manifest(folder, "tensorrt", {**origin, **described, **exactness(inexact)})
        files = file_list(folder)
    result = export_result(output, files, checkpoint, inexact, started, onnx_linear_bytes(output))
    if built is None:
        return {**result, "trtexec": trtexec_line(output / MODEL, output / PLAN, profiles)}
    plan_bytes = next(item["bytes"] for item in files if item["path"] == PLAN)
    result["bits_per_weight"] = 8 * plan_bytes / checkpoint.config.num_parameters
    result["peak_rss_bytes"] = max(result["peak_rss_bytes"], built["peak_rss_bytes"])
    result["build"] = {key: built[key] for key in ("seconds", "peak_rss_bytes", "predicted")}
    return result


def profiles_of(checkpoint: Checkpoint, profile: Profile) -> list[Shapes]:
    """The optimization profiles of a model's plan; see `ship.tensorrt.profiles`."""
    return [prefill_shapes(checkpoint.config, profile)]


def _named(engine: str, capabilities: Sequence[str], built: dict[str, Any] | None) -> list[str]:
    """The compute capabilities that a plan is for.

    They are those asked for, or that of the GPU it was built on.
    """
    if engine == "rtx":
        return list(capabilities)
    return [str(built["capability"])] if built and built.get("capability") else []


def _built(
    folder: Path,
    engine: str,
    capabilities: Sequence[str],
    profiles: Sequence[Shapes],
    progress: Progress,
) -> dict[str, Any]:
    """Build the plan and check what came out.

    What was predicted stands beside what it took.
    """
    started = time.monotonic()
    with progress.bar("build plan", 1) as tick:
        built = _build(folder, engine, capabilities, profiles)
        tick()
    if engine == "rtx":
        check_header(folder / PLAN, built["version"], capabilities)
        check_weights(folder)
    predicted = build_cost((folder / DATA).stat().st_size)
    return {**built, "seconds": time.monotonic() - started, "predicted": asdict(predicted)}


def scale_errors(checkpoint: Checkpoint, precision: str) -> list[dict[str, Any]]:
    """Tensors in 8-bit scales that the plan changes, with their largest relative error.

    It multiplies NVFP4's two scales together in 16 bits, and holds a power of two as a number of 16 bits.
    """
    names = [name for name, scheme in checkpoint.schemes.items() if scheme.scale_dtype in ("e4m3", "e8m0")]
    found = []
    for name in names:
        weight = checkpoint.linear(name)
        assert isinstance(weight, QuantizedTensor)
        if error := qdq.inexact_scales(weight, TYPES[precision]):
            found.append({"name": name, "max_rel_error": error})
    return found


def check_request(
    checkpoint: Checkpoint,
    engine: str,
    capabilities: Sequence[str] | None,
    precision: str,
    profile: Profile | None = None,
    onnx_only: bool = False,
) -> tuple[str, ...]:
    """Everything that can be known before the long work.

    Returns the capabilities, chosen where None was given.
    """
    if capabilities is None:
        capabilities = fitting(checkpoint.schemes.values(), DEFAULT)
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
    if reason := too_old(checkpoint.schemes.values(), precision, capabilities):
        raise UnsupportedError(reason, "name later capabilities with --sm, or quantize with another recipe")
    if not onnx_only:
        _check_builder(checkpoint, engine, profile or default_profile(checkpoint.config))
        check_memory(onnx_size.weight_bytes(checkpoint, precision))
    return tuple(capabilities)


def _check_builder(checkpoint: Checkpoint, engine: str, profile: Profile) -> None:
    """Raise MissingRuntimeError without the engine's library.

    Of `trt` it gives the line for the device.
    """
    if importlib.util.find_spec(MODULES[engine]) is not None:
        return
    hint = INSTALL[engine]
    if engine == "trt":
        line = trtexec_line(Path(MODEL), Path(PLAN), profiles_of(checkpoint, profile))
        hint = f"{hint}; or write the ONNX here with --onnx-only, and on the device, inside that folder: {line}"
    raise MissingRuntimeError(f"--engine {engine} needs the {MODULES[engine]} package", hint)


def planned_bytes(checkpoint: Checkpoint, precision: str = "fp16") -> int:
    """Size of the folder that an export would write.

    It is known from shapes alone: the ONNX, and a plan with the same weights.
    """
    block = _QUANTIZED_BLOCK_BYTES if checkpoint.schemes else _BLOCK_BYTES
    plan = onnx_size.weight_bytes(checkpoint, precision) + _ENGINE_BYTES + block * checkpoint.config.num_layers
    return onnx_size.planned_bytes(checkpoint, precision) + plan


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
    """Raise UnsupportedError when the plan has expanded its codes.

    It then holds clearly more weight bytes than its ONNX.
    """
    with (folder / PLAN).open("rb") as file:
        file.seek(56)
        stored = int.from_bytes(file.read(8), "little")
    given = (folder / DATA).stat().st_size
    if stored > _EXPANDED * given + _SLACK_BYTES:
        raise UnsupportedError(
            f"the plan has {stored} bytes of weights, its ONNX {given}: TensorRT expanded quantized weights",
            "choose a group_size of 32, 64 or 128 that is smaller than the matrices, or strategy: channel",
        )
