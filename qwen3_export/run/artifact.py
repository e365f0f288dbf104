"""Opening any artifact in its own runtime, and what it brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.coverage import GGUF_KEY, Summary, read_coverage, summary_of
from qwen3_export.core.gguf_header import gguf_parts, refuse_no_model
from qwen3_export.core.memory import memory_named
from qwen3_export.core.onnx_header import onnx_data_files
from qwen3_export.core.plan_folder import ENGINE, check_plan
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.devices import PROVIDERS, check_device, find_provider
from qwen3_export.run.onnx_files import find_onnx, is_onnx
from qwen3_export.run.plan_files import has_plan, load_runtime, read_plan
from qwen3_export.run.session import HasMetadata, HasTokenizer, RuntimeOptions, Session, with_checked_logits
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel


def open_session(artifact: Path, options: RuntimeOptions | None = None) -> Session:
    """Open an artifact in its own runtime.

    Raises InputError when it is none, MissingRuntimeError without it, ResourceError where memory is too small.
    """
    with memory_named(artifact):
        return with_checked_logits(_open(artifact, options or RuntimeOptions()), artifact.name)


def kind_of(artifact: Path) -> str:
    """What an artifact is: `onnx`, `gguf` or `folder`.

    It is told without a runtime. Raises InputError when it is none.
    """
    if artifact.is_file():
        if is_onnx(artifact):
            return "onnx"
        with artifact.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            refuse_no_model(artifact)
            return "gguf"
        raise InputError(
            f"{artifact}: neither a GGUF file, an ONNX file nor an artifact folder",
            "give an artifact folder, a .onnx or a .gguf file",
        )
    if not artifact.is_dir():
        raise InputError(f"{artifact}: no such artifact")
    if is_onnx(artifact):
        return "onnx"
    if (artifact / "config.json").is_file():
        return "folder"
    raise InputError(
        f"{artifact}: neither an ONNX graph nor config.json is in it", "give an artifact folder or a .gguf file"
    )


def _open(artifact: Path, options: RuntimeOptions) -> Session:
    kind = kind_of(artifact)
    check_runnable(artifact, options.device, options.exact)
    if kind == "onnx" and takes_plan(artifact, options):
        from qwen3_export.run.tensorrt import PlanSession

        return PlanSession(artifact, options)
    if kind == "onnx":
        from qwen3_export.run.ort import OrtSession

        session = OrtSession(artifact, options)
        if has_plan(artifact):
            session.plan_not_run = why_not(artifact) or f"--device {options.device}" if not options.exact else "--exact"
        return session
    if kind == "gguf":
        from qwen3_export.run.llamacpp import LlamaSession

        # llama.cpp opens a split model by its first part.
        return LlamaSession(gguf_parts(artifact)[0], options)
    from qwen3_export.run.torch import TorchSession

    return TorchSession(artifact, options)


def takes_plan(artifact: Path, options: RuntimeOptions) -> bool:
    """Whether a TensorRT folder's plan is what runs.

    Where it was not asked for by name it runs where driver, GPU, library and version fit.

    Raises InputError for a plan that was asked for and is not there, MissingRuntimeError where it cannot run.
    """
    if options.device == "plan" and not has_plan(artifact):
        raise InputError(
            f"{artifact}: there is no plan in it", "give a folder of `qwen3-export tensorrt`, without --onnx-only"
        )
    if options.device == "plan" and options.exact:
        raise InputError("--exact: a plan has one precision", "leave --device away: its ONNX has an exact mode")
    if options.device == "plan":
        return True
    return options.device is None and not options.exact and has_plan(artifact) and why_not(artifact) is None


def why_not(artifact: Path) -> str | None:
    """Why a TensorRT folder's plan cannot run here, or None when it can."""
    try:
        gpu, _ = load_runtime(read_plan(artifact))
    except MissingRuntimeError as error:
        return str(error)
    gpu.close()
    return None


def check_runnable(artifact: Path, device: str | None, exact: bool = False) -> None:
    """Raise what an artifact and its device would raise, before any long work.

    Nothing of the artifact is loaded.
    """
    options = RuntimeOptions(device=device, exact=exact)
    check_device(device)
    kind = kind_of(artifact)
    if kind == "onnx" and (artifact / ENGINE).is_file():
        read_plan(artifact)
        if has_plan(artifact) and device in (None, "plan") and not exact:
            check_plan(artifact)
    if kind != "onnx":
        if device not in (None, "cpu"):
            raise InputError(
                f"{artifact}: --device {device} is for ONNX and TensorRT folders", "leave --device away for this one"
            )
    elif device == "plan":
        takes_plan(artifact, options)
        load_runtime(read_plan(artifact))[0].close()
    elif device in PROVIDERS:
        find_provider(str(device))


def of_a_plan(session: Session) -> dict[str, Any]:
    """What a report says of a TensorRT folder beside its figures.

    Why its plan did not run, or the GPU's memory that it took.
    """
    told = {name: getattr(session, name, None) for name in ("plan_not_run", "device_memory_bytes")}
    return {name: value for name, value in told.items() if value is not None}


def plan_line(artifact: str, found: Mapping[str, Any]) -> str | None:
    """Why an ONNX ran in place of its plan, as a line; else None."""
    reason = found.get("plan_not_run")
    return f"{artifact}: its ONNX ran in ONNX Runtime, not its plan: {reason}" if reason else None


def tokenizer_of(artifact: Path, session: Session) -> TextModel:
    """The artifact's own tokenizer: in the folder, or inside the GGUF file."""
    if isinstance(session, HasTokenizer):
        return session.tokenizer
    return ModelTokenizer(find_onnx(artifact).folder if artifact.is_file() else artifact)


def artifact_coverage(artifact: Path, session: Session) -> Summary | None:
    """How many calibration tokens the artifact's experts saw; None for a model without experts."""
    if not isinstance(session, HasMetadata):
        return read_coverage(artifact if artifact.is_dir() else artifact.parent)
    if not (session.metadata("general.architecture") or "").endswith("moe"):
        return None
    text = session.metadata(GGUF_KEY)
    try:
        return summary_of(json.loads(text or "{}"))
    except ValueError:
        return summary_of({})


def artifact_bytes(artifact: Path) -> int:
    """Size of an artifact on disk."""
    if artifact.is_file():
        files = [artifact, *onnx_data_files(artifact)] if artifact.suffix == ".onnx" else gguf_parts(artifact)
        return sum(path.stat().st_size for path in files)
    return sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
