"""`python -m benchmarks.runtime`: prefill and decode of one model in several runtimes.

In each turn every runner answers the same prompt, in a process of its own and in another order, so that other work on
the machine falls on all of them. The table has medians, their ratio to a rival's in the same turns (the model of
onnxruntime-genai's builder, or the same folder with an unquantized cache), the bytes that a token reads, and their
share of the memory bandwidth. Quantized caches are timed again after a longer prompt. Artifacts are made before the
first turn; `--make-only` stops there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.report import table
from benchmarks.quality.venvs import cache_folder
from benchmarks.runtime import machine, models
from benchmarks.runtime.runners import GENAI, Runner, runtime_of, weights
from qwen3_export.prove.meters import MachineLoad

MAKERS = {"ours": models.ours, "builder": models.builder, "llama.cpp": models.llama}
# Tool and kind → the rival in the same runtime whose time it is compared with.
RUNS = {
    "ours edge-w4": "builder int4",
    "ours edge-w4-head8": "builder int4",
    "ours edge-w4 kv-int8": "ours edge-w4",
    "ours edge-w4 kv-int4": "ours edge-w4",
    "builder int4": None,
    "ours edge-w8": "builder int8",
    "ours int8-dynamic": "builder int8",
    "builder int8": None,
    "llama.cpp q4_0": None,
    "llama.cpp q4_k_m": None,
}
CACHES = ("ours edge-w4", "ours edge-w4 kv-int8", "ours edge-w4 kv-int4")
HEADERS = [
    "artifact", "runtime", "MB a token", "prefill tok/s", "decode tok/s", "decode beside", "prefill beside",
    "of the bandwidth",
]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """A length of prompt and the runners that answered it."""

    prompt: int
    runners: Sequence[Runner]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--only", nargs="*", choices=RUNS, metavar="RUN", help=f"some of: {', '.join(RUNS)}")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--long-prompt", type=int, default=1024, help="for quantized caches; 0 leaves it out")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-genai", action="store_true", help="our own session alone")
    parser.add_argument("--make-only", action="store_true", help="make what is missing, measure nothing")
    parser.add_argument("--output", type=Path, help="write the tables into this Markdown file, too")
    return parser.parse_args()


def artifacts(given: argparse.Namespace) -> dict[str, Path]:
    """All artifacts, made where missing."""
    base = cache_folder() / "runtime" / f"{given.layers}-{given.vocabulary}"
    source = models.checkpoint(base / "model", given.layers, given.vocabulary)
    found = {}
    for name in given.only or RUNS:
        tool, _, kind = name.partition(" ")
        found[name] = MAKERS[tool](base, source, kind)
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def take_turns(runners: Sequence[Runner], length: int, new: int, turns: int) -> Round:
    """All runners answer the same prompt, turn by turn, each turn in another order."""
    random = np.random.default_rng(0)
    for turn in range(turns):
        for place in random.permutation(len(runners)):
            runners[place].turn(length, new)
        print(f"prompt of {length}: turn {turn + 1} of {turns}", file=sys.stderr)
    return Round(length, runners)


def main() -> None:
    given = arguments()
    made = artifacts(given)
    if given.make_only:
        return
    if warning := machine.warning():
        print(f"warning: {warning}", file=sys.stderr)
    bandwidth = machine.read_bandwidth(given.threads)
    runners = []
    for name, artifact in made.items():
        runners.append(Runner(name, runtime_of(artifact), artifact, given.threads))
        if artifact.is_dir() and not given.no_genai:
            runners.append(Runner(name, GENAI, artifact, given.threads))
    load = MachineLoad()
    rounds = [take_turns(runners, given.prompt, given.new, given.turns)]
    again = [runner for runner in runners if runner.name in CACHES and runner.runtime != GENAI]
    if given.long_prompt and len(again) > 1:
        fresh = [Runner(runner.name, runner.runtime, runner.artifact, runner.threads) for runner in again]
        rounds.append(take_turns(fresh, given.long_prompt, given.new, 3))
    text = report(given, rounds, bandwidth, load.others())
    print(text)
    if given.output:
        given.output.write_text(f"# Decode and prefill, ONNX and GGUF\n\n{text}\n", encoding="utf-8")


def report(given: argparse.Namespace, rounds: Sequence[Round], bandwidth: float, others: float | None) -> str:
    """The results as Markdown."""
    lines = [
        f"`python -m benchmarks.runtime`: the shape of Qwen3-0.6B, {given.layers} layers, {given.vocabulary} tokens, "
        f"random weights, {given.threads} threads; medians of {given.turns} turns.",
        machine.describe(),
        f"{given.threads} threads read {bandwidth / 1e9:.1f} GB/s from memory; other work took "
        f"{0.0 if others is None else others:.2f} processors while this was measured.",
    ]
    if others is not None and others > machine.QUIET:
        lines.append("**Warning: other work ran; the figures are too low.**")
    for item in rounds:
        lines += [f"Prompt of {item.prompt} tokens, then {given.new} new ones:", table(HEADERS, rows(item, bandwidth))]
    return "\n\n".join(lines)


def rows(item: Round, bandwidth: float) -> list[list[str]]:
    """One row a runner."""
    return [_row(runner, item, bandwidth) for runner in item.runners]


def _row(runner: Runner, item: Round, bandwidth: float) -> list[str]:
    token, rival_name, read = statistics.median(runner.token), RUNS[runner.name], weights(runner.artifact)
    rival = next((r for r in item.runners if (r.name, r.runtime) == (rival_name, runner.runtime)), None)
    return [
        runner.name, runner.runtime, f"{read / 1e6:.0f}",
        f"{item.prompt / statistics.median(runner.prefill):.0f}", f"{1 / token:.1f}",
        _beside(runner.token, rival.token if rival else None, rival_name),
        _beside(runner.prefill, rival.prefill if rival else None, rival_name),
        f"{read / token / bandwidth:.2f}",
    ]  # fmt: skip


def _beside(own: Sequence[float], rival: Sequence[float] | None, name: str | None) -> str:
    """Speed relative to the rival's, compared turn by turn."""
    if rival is None:
        return ""
    return f"{statistics.median(theirs / mine for mine, theirs in zip(own, rival, strict=True)):.2f} × {name}"


if __name__ == "__main__":
    main()
