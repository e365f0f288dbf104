"""`python -m benchmarks.runtime`: prefill and decode of one model, runtime by runtime, in turn.

Every runner answers the same prompt in each turn, so that what the machine does besides falls on all of them; medians
are printed, with their ratio to onnxruntime-genai's builder's model in the same session, the bytes that a token
reads, and the share of the memory bandwidth that this is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.quality.venvs import cache_folder
from benchmarks.runtime import machine, models
from qwen3_export.cli.console import table
from qwen3_export.run.artifact import artifact_bytes, open_session
from qwen3_export.run.session import RuntimeOptions

KINDS = {"ours": models.ours, "builder": models.builder, "llama.cpp": models.llama}
RUNS = (
    ("ours", "int4"), ("builder", "int4"), ("ours", "int8"), ("builder", "int8"),
    ("llama.cpp", "q4_0"), ("llama.cpp", "q4_k_m"),
)  # fmt: skip


@dataclass
class Runner:
    """One artifact in one runtime, and the seconds of its turns."""

    name: str
    runtime: str
    bytes: int
    turn: Callable[[np.ndarray, int], tuple[float, float]]
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


def in_session(name: str, artifact: Path, threads: int) -> Runner:
    """The artifact in our own session."""
    session = open_session(artifact, RuntimeOptions(threads=threads, context=2048))

    def turn(prompt: np.ndarray, new: int) -> tuple[float, float]:
        started = time.perf_counter()
        token = int(session.prefill(prompt)[-1].argmax())
        prefill, seconds = time.perf_counter() - started, []
        for _ in range(new):
            started = time.perf_counter()
            token = int(session.decode(token).argmax())
            seconds.append(time.perf_counter() - started)
        return prefill, statistics.median(seconds)

    return Runner(name, session.runtime, weights(artifact), turn)


def in_genai(name: str, folder: Path) -> Runner:
    """The folder in onnxruntime-genai."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))

    def turn(prompt: np.ndarray, new: int) -> tuple[float, float]:
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
        return prefill, statistics.median(seconds)

    return Runner(name, "onnxruntime-genai", weights(folder), turn)


def weights(artifact: Path) -> int:
    """Bytes that a decoded token reads: all weights, since embedding and head are one matrix."""
    return (
        sum(path.stat().st_size for path in artifact.glob("*.data*")) if artifact.is_dir() else artifact_bytes(artifact)
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--only", nargs="*", help="for example ours:int4 builder:int4 llama.cpp:q4_0")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--genai", action="store_true", help="ONNX folders in onnxruntime-genai, too")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    base = cache_folder() / "runtime" / f"{given.layers}-{given.vocabulary}"
    source = models.checkpoint(base / "model", given.layers, given.vocabulary)
    runners = []
    for tool, kind in RUNS:
        if given.only and f"{tool}:{kind}" not in given.only:
            continue
        artifact = KINDS[tool](base, source, kind)
        runners.append(in_session(f"{tool} {kind}", artifact, given.threads))
        if given.genai and artifact.is_dir():
            runners.append(in_genai(f"{tool} {kind}", artifact))
    if found := machine.warning():
        print(f"warning: {found}", file=sys.stderr)
    bandwidth = machine.read_bandwidth(given.threads)
    prompt = np.random.default_rng(0).integers(0, 8000, given.prompt).astype(np.int32)
    for turn in range(given.turns + 1):
        for runner in runners:
            prefill, token = runner.turn(prompt, given.new)
            if turn:
                runner.prefill.append(prefill)
                runner.token.append(token)
    print(f"{given.threads} threads read {bandwidth / 1e9:.1f} GB/s; {given.layers} layers, {given.vocabulary} tokens")
    table(_HEADERS, [_row(runner, runners, given.prompt, bandwidth) for runner in runners])


_HEADERS = [
    "artifact", "runtime", "MB a token", "prefill tok/s", "decode tok/s", "beside the builder's", "of the bandwidth",
]  # fmt: skip


def _row(runner: Runner, runners: list[Runner], prompt: int, bandwidth: float) -> list[str]:
    token, kind = statistics.median(runner.token), runner.name.split()[1]
    rival = next((r for r in runners if (r.name, r.runtime) == (f"builder {kind}", runner.runtime)), None)
    ratio = (
        ""
        if rival is None
        else f"{statistics.median(b / a for a, b in zip(runner.token, rival.token, strict=True)):.2f} ×"
    )
    return [
        runner.name, runner.runtime, f"{runner.bytes / 1e6:.0f}", f"{prompt / statistics.median(runner.prefill):.0f}",
        f"{1 / token:.1f}", ratio, f"{runner.bytes / token / bandwidth:.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
