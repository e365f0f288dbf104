"""Opening any artifact in its own runtime, and what it brings along."""

from __future__ import annotations

import json
from pathlib import Path

from qwen3_export.core.coverage import GGUF_KEY, Summary, read_coverage, summary_of
from qwen3_export.core.onnx_header import onnx_data_files
from qwen3_export.errors import InputError
from qwen3_export.run.onnx_files import find_onnx, is_onnx
from qwen3_export.run.session import HasMetadata, HasTokenizer, RuntimeOptions, Session, with_checked_logits
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel


def open_session(artifact: Path, options: RuntimeOptions | None = None) -> Session:
    """Open an artifact in its own runtime.

    Raises InputError when it is none, MissingRuntimeError without it.
    """
    return with_checked_logits(_open(artifact, options or RuntimeOptions()), artifact.name)


def kind_of(artifact: Path) -> str:
    """What an artifact is: `onnx`, `gguf` or `folder`.

    It is told without a runtime. Raises InputError when it is none.
    """
    if artifact.is_file():
        if is_onnx(artifact):
            return "onnx"
        with artifact.open("rb") as file:
            if file.read(4) == b"GGUF":
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
    if kind == "onnx":
        from qwen3_export.run.ort import OrtSession

        return OrtSession(artifact, options)
    if kind == "gguf":
        from qwen3_export.run.llamacpp import LlamaSession

        return LlamaSession(artifact, options)
    from qwen3_export.run.torch import TorchSession

    return TorchSession(artifact, options)


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
        outside = onnx_data_files(artifact) if artifact.suffix == ".onnx" else []
        return sum(path.stat().st_size for path in [artifact, *outside])
    return sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
