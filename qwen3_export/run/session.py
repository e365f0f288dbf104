"""What every runtime offers, and which runtime an artifact belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.finite import all_finite
from qwen3_export.core.memory import memory_named
from qwen3_export.errors import InputError
from qwen3_export.text.tokenizer import TextModel


@dataclass(frozen=True)
class RuntimeOptions:
    """How to open an artifact.

    `exact` asks for the runtime's highest-precision mode. `device` is one of `run.devices.DEVICES`; None takes a plan
    where its GPU is, and else the processor.
    """

    threads: int | None = None
    context: int | None = None
    exact: bool = False
    device: str | None = None


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


class Bounded(Protocol):
    """What says which tokens it takes, and how many."""

    vocab_size: int
    context: int


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


Opened = TypeVar("Opened", bound=Session)


def with_checked_logits(session: Opened, name: str) -> Opened:
    """The session, whose logits are checked from now on.

    NaN or infinity is an InputError in every runtime, a failed allocation a ResourceError.
    """
    where = f"{name} in {session.runtime}"

    def checked(run: Callable[[Any], NDArray[np.float32]]) -> Callable[[Any], NDArray[np.float32]]:
        def call(given: Any) -> NDArray[np.float32]:
            with memory_named(where):
                return check_logits(run(given), where)

        return call

    # On the object itself, so that it stays what it is to those who ask for more than logits.
    vars(session).update(prefill=checked(session.prefill), decode=checked(session.decode))
    return session


def check_logits(logits: NDArray[np.float32], where: str) -> NDArray[np.float32]:
    """The logits, when all are finite; InputError when one is NaN or infinity."""
    if not all_finite(logits):
        raise InputError(
            f"{where}: the tensor logits holds NaN or infinity",
            "its weights are damaged, or its activations too large for 16 bits: export again with --precision fp32",
        )
    return logits


def check_ids(session: Bounded, name: Path, ids: NDArray, past: int) -> None:
    """Raise InputError for tokens that the model lacks, or too many.

    `past` others came before them.
    """
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
