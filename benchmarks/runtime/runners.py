"""One artifact in one runtime, and the seconds of its turns.

Every turn is a process of its own: of several sessions in one process, the one that was opened first is up to a fifth
slower, and threads that still spin after their work slow the next one down.

    python -m benchmarks.runtime.runners ARTIFACT RUNTIME PROMPT NEW THREADS

is such a turn; it prints `[seconds of the prompt, median seconds of a new token]`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.quality.process import environment
from qwen3_export.run.artifact import artifact_bytes, open_session
from qwen3_export.run.session import RuntimeOptions

GENAI, SESSION = "onnxruntime-genai", "session"
# Answers a prompt: the first value after the prompt, then one after each new token.
Answer = Callable[[np.ndarray, int], Iterator[None]]


@dataclass
class Runner:
    """An artifact's name, the runtime's, and what its turns took; `token` holds the median of each turn's tokens."""

    name: str
    runtime: str
    artifact: Path
    threads: int
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def turn(self, prompt: int, new: int) -> None:
        """Answer a prompt of so many tokens with `new` ones in a process, and keep the time."""
        kind = GENAI if self.runtime == GENAI else SESSION
        command = [sys.executable, "-m", "benchmarks.runtime.runners", self.artifact, kind, prompt, new, self.threads]
        done = subprocess.run(
            [str(part) for part in command], env=environment(self.threads, {}), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{self.name} in {self.runtime}: {done.stderr[-800:]}")
        prefill, token = json.loads(done.stdout)
        self.prefill.append(prefill)
        self.token.append(token)


def in_session(artifact: Path, threads: int) -> Answer:
    """The artifact in our own session."""
    session = open_session(artifact, RuntimeOptions(threads=threads, context=2048))

    def answer(prompt: np.ndarray, new: int) -> Iterator[None]:
        token = int(session.prefill(prompt)[-1].argmax())
        yield
        for _ in range(new):
            token = int(session.decode(token).argmax())
            yield

    return answer


def in_genai(folder: Path, threads: int) -> Answer:
    """The folder in onnxruntime-genai, with as many threads."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def answer(prompt: np.ndarray, new: int) -> Iterator[None]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + new + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        yield
        for _ in range(new):
            generator.generate_next_token()
            yield

    return answer


def timed(answer: Answer, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of a random prompt and the median of its new tokens, of the second answer; the first warms up."""
    ids = np.random.default_rng(0).integers(0, 8000, prompt).astype(np.int32)
    for _ in answer(ids, new):
        pass
    moments = [time.perf_counter()] + [time.perf_counter() for _ in answer(ids, new)]
    steps = [after - before for before, after in pairwise(moments)]
    return steps[0], statistics.median(steps[1:])


def runtime_of(artifact: Path) -> str:
    """The runtime that our session opens an artifact in."""
    return "onnxruntime" if artifact.is_dir() else "llama.cpp"


def weights(artifact: Path) -> int:
    """Bytes that a decoded token reads: all weights but those of which it looks up one row."""
    if not artifact.is_dir():
        return artifact_bytes(artifact)
    stored = sum(path.stat().st_size for path in artifact.glob("*.data*"))
    return stored - _looked_up(artifact / "model.onnx")


def _looked_up(path: Path) -> int:
    """Bytes of tables that lookups alone use, of an embedding that is not the head's matrix."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    sizes = {
        tensor.name: next((int(pair.value) for pair in tensor.external_data if pair.key == "length"), 0)
        for tensor in graph.initializer
    }
    lookups = {"Gather", "GatherBlockQuantized"}
    return sum(size for name, size in sizes.items() if readers.get(name, set()) and readers[name] <= lookups)


def main() -> None:
    """One turn."""
    artifact, kind, prompt, new, threads = sys.argv[1:]
    opened = (in_genai if kind == GENAI else in_session)(Path(artifact), int(threads))
    print(json.dumps(timed(opened, int(prompt), int(new))))


if __name__ == "__main__":
    main()
