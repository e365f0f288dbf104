"""One artifact in one runtime, and the seconds of its turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen3_export.run.artifact import artifact_bytes, open_session
from qwen3_export.run.session import RuntimeOptions

GENAI = "onnxruntime-genai"
# Seconds of the prompt, and of each new token.
Turn = Callable[[np.ndarray, int], tuple[float, list[float]]]


@dataclass
class Runner:
    """An artifact in a runtime, its weights' bytes, and the times of its turns.

    `token` holds the median time per token of each turn.
    """

    name: str
    runtime: str
    bytes: int
    answer: Turn
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def turn(self, prompt: np.ndarray, new: int) -> None:
        """Answer the prompt with `new` tokens and record the times."""
        prefill, tokens = self.answer(prompt, new)
        self.prefill.append(prefill)
        self.token.append(statistics.median(tokens))

    def forget_first(self) -> None:
        """Drop the first turn, which warmed up."""
        del self.prefill[0], self.token[0]


def in_session(name: str, artifact: Path, threads: int) -> Runner:
    """The artifact in our own session."""
    session = open_session(artifact, RuntimeOptions(threads=threads, context=2048))

    def answer(prompt: np.ndarray, new: int) -> tuple[float, list[float]]:
        started, seconds = time.perf_counter(), []
        token = int(session.prefill(prompt)[-1].argmax())
        prefill = time.perf_counter() - started
        for _ in range(new):
            started = time.perf_counter()
            token = int(session.decode(token).argmax())
            seconds.append(time.perf_counter() - started)
        return prefill, seconds

    return Runner(name, session.runtime, weights(artifact), answer)


def in_genai(name: str, folder: Path, threads: int) -> Runner:
    """The folder in onnxruntime-genai, with as many threads."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def answer(prompt: np.ndarray, new: int) -> tuple[float, list[float]]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + new + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator, seconds = onnxruntime_genai.Generator(model, parameters), []
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        prefill = time.perf_counter() - started
        for _ in range(new):
            started = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - started)
        return prefill, seconds

    return Runner(name, GENAI, weights(folder), answer)


def weights(artifact: Path) -> int:
    """Bytes that decoding a token reads: all weights, as embedding and head are tied."""
    if not artifact.is_dir():
        return artifact_bytes(artifact)
    return sum(path.stat().st_size for path in artifact.glob("*.data*"))
