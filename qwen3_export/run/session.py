"""What every runtime offers, and which runtime an artifact belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.coverage import GGUF_KEY, Summary, read_coverage, summary_of
from qwen3_export.errors import InputError
from qwen3_export.text import ModelTokenizer, TextModel


@dataclass(frozen=True)
class RuntimeOptions:
    """How to open an artifact. `exact` asks for the runtime's highest-precision mode."""

    threads: int | None = None
    context: int | None = None
    exact: bool = False


class Session(Protocol):
    """One loaded artifact and one sequence in progress."""

    runtime: str
    version: str
    device: str
    threads: int
    vocab_size: int
    context: int

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]` of every position."""

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token to the sequence; logits `[vocab]` of the next one."""

    def close(self) -> None:
        """Free the model."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A session that brings its tokenizer along."""

    @property
    def tokenizer(self) -> TextModel:
        """The runtime's own tokenizer."""


@runtime_checkable
class HasMetadata(Protocol):
    """A session whose artifact is one file with a header."""

    def metadata(self, key: str) -> str | None:
        """A value of the header as text, None when there is none."""


def open_session(artifact: Path, options: RuntimeOptions | None = None) -> Session:
    """Open an artifact in its own runtime; InputError when it is none, MissingRuntimeError without it."""
    options = options or RuntimeOptions()
    if artifact.is_file():
        with artifact.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{artifact}: neither a GGUF file nor an artifact folder")
        from qwen3_export.run.llamacpp import LlamaSession

        return LlamaSession(artifact, options)
    if not artifact.is_dir():
        raise InputError(f"{artifact}: no such artifact")
    if (artifact / "model.onnx").is_file():
        from qwen3_export.run.ort import OrtSession

        return OrtSession(artifact, options)
    if (artifact / "config.json").is_file():
        from qwen3_export.run.torch import TorchSession

        return TorchSession(artifact, options)
    raise InputError(
        f"{artifact}: neither model.onnx nor config.json is in it", "give an artifact folder or a .gguf file"
    )


def check_ids(session: Session, name: Path, ids: NDArray, past: int) -> None:
    """Raise InputError when tokens are no tokens of the model, or too many after `past` others."""
    if not len(ids) or past + len(ids) > session.context:
        raise InputError(f"{name}: {past + len(ids)} tokens, between 1 and {session.context} were expected")
    if ids.min() < 0 or ids.max() >= session.vocab_size:
        raise InputError(f"{name}: token ids {ids.min()} to {ids.max()}, the vocabulary has {session.vocab_size}")


def greedy(session: Session, prompt: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """The `count` most likely next tokens."""
    tokens = [int(session.prefill(prompt)[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(session.decode(tokens[-1]).argmax()))
    return np.asarray(tokens[:count], np.int64)


def tokenizer_of(artifact: Path, session: Session) -> TextModel:
    """The artifact's own tokenizer: in the folder, or inside the GGUF file."""
    if isinstance(session, HasTokenizer):
        return session.tokenizer
    return ModelTokenizer(artifact)


def artifact_coverage(artifact: Path, session: Session) -> Summary | None:
    """How many calibration tokens the artifact's experts saw; None for a model without experts."""
    if not isinstance(session, HasMetadata):
        return read_coverage(artifact)
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
        return artifact.stat().st_size
    return sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
