"""`python -m benchmarks.cost`: time and memory of quantizing at the full Qwen3-0.6B shape.

The weights are random, so only time and memory mean anything. Every run is a process of its own that reads its source
from the disk. All tools see the same rows, and take turns, so that a slow spell of the machine hits all of them. The
plain reading and writing of the same bytes is timed too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.cost.disk import disk_seconds, evict
from benchmarks.quality.plan import Job
from benchmarks.quality.process import Cost, run
from benchmarks.quality.report import table
from benchmarks.quality.runs import PACKAGE, Setting, command, make_setting
from benchmarks.quality.venvs import NAMES, cache_folder, python_of, version
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.source import locate
from qwen3_export.core.tensorfile import TensorFileWriter

FULL = 28
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": 8187,
    "pad_token_id": 8185,
}
SCHEME = "w4-g128"
JOBS = (
    Job("ours", "rtn-w4a16-g128", SCHEME),
    Job("gptqmodel", "rtn", SCHEME),
    Job("llmcompressor", "rtn", SCHEME),
    Job("ours", "gptq-plain-w4a16-g128", SCHEME),
    Job("ours", "gptq-w4a16-g128", SCHEME),
    Job("ours", "gptq-w4a16-g128-unfolded", SCHEME),
    Job("ours", "gptq-max-w4a16-g128", SCHEME),
    Job("gptqmodel", "gptq", SCHEME),
    Job("llmcompressor", "gptq", SCHEME),
)
MEASURES = ("wall_s", "cpu_s", "peak_rss")


def checkpoint(layers: int) -> Path:
    """A random bf16 model of the full shape with `layers` layers."""
    return random_checkpoint(f"qwen3-0.6b-shape-{layers}", {**SHAPE, "num_hidden_layers": layers})


def random_checkpoint(name: str, values: dict[str, Any]) -> Path:
    """A cached folder with random bf16 weights and the reference model's tokenizer.

    It is written with one tensor in memory at a time.
    """
    folder = cache_folder() / "checkpoints" / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(values, indent=1))
    shapes, random = parse_config(values, "config").tensor_shapes(), np.random.default_rng(0)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    with TensorFileWriter(
        partial / "model.safetensors", {name: (bf16, shape) for name, shape in shapes.items()}, {"format": "pt"}
    ) as writer:
        for name, shape in shapes.items():
            writer.write(name, weights(random, shape).astype(bf16))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("reference-model") / file, partial / file)
    partial.rename(folder)
    return folder


def weights(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norms of one, matrices with the variance of an untrained model."""
    return np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * random.standard_normal(shape, np.float32)


def measure(job: Job, setting: Setting, given: argparse.Namespace) -> Cost:
    """The cost of one run, whose output is deleted."""
    folder = cache_folder() / "cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    evict(setting.checkpoint)
    extra = {"PYTHONPATH": str(PACKAGE.parent)} if job.tool == "ours" else {}
    cost = run(command(job, setting, folder), folder, given.threads, given.timeout, **extra)
    shutil.rmtree(folder)
    return cost


def extended(short: float, long: float, layers: int) -> float:
    """Extrapolate costs at 1 and `layers` layers to full depth; NaN when they fall."""
    if long < short:
        return math.nan
    return short + (long - short) * (FULL - 1) / (layers - 1)


def collect(given: argparse.Namespace) -> tuple[dict[Job, dict[int, list[Cost]]], float]:
    """Costs of every job at every depth, and the disk's seconds at the largest.

    A job that fails is left out.
    """
    depths, disk = [FULL] if given.layers == FULL else [1, given.layers], []
    settings = {n: make_setting("cost", checkpoint(n), given.samples, given.sequence_length, None) for n in depths}
    found: dict[Job, dict[int, list[Cost]]] = {job: {n: [] for n in depths} for job in JOBS if wanted(job, given)}
    for turn in range(given.repeat):
        for job in list(found):
            for depth, setting in settings.items():
                try:
                    cost = measure(job, setting, given)
                except RuntimeError as error:
                    print(f"{job.tool} {job.method}: failed: {error}", file=sys.stderr)
                    found.pop(job)
                    break
                found[job][depth].append(cost)
                print(f"turn {turn}  {job.tool} {job.method}  {depth} layers: {cost}", file=sys.stderr, flush=True)
        disk.append(disk_seconds(checkpoint(depths[-1]), cache_folder()))
    return found, statistics.median(disk)


def wanted(job: Job, given: argparse.Namespace) -> bool:
    return given.only is None or f"{job.tool}:{job.method}" in given.only


def medians(costs: dict[int, list[Cost]], layers: int) -> dict[str, float]:
    """Medians of all measures, times extrapolated to the full depth.

    Memory is that of the deepest run: it does not grow with depth, and a line through two peaks would show noise.
    """
    at = {n: {m: statistics.median(getattr(c, m) for c in many) for m in MEASURES} for n, many in costs.items()}
    if layers == FULL:
        return at[FULL]
    return {m: at[layers][m] if m == "peak_rss" else extended(at[1][m], at[layers][m], layers) for m in MEASURES}


def peaks(costs: dict[int, list[Cost]]) -> str:
    """Peak memory in MiB at every depth, on which it should not depend."""
    at = {n: statistics.median(cost.peak_rss for cost in many) for n, many in costs.items()}
    return ", ".join(f"{size / 2**20:.0f} at {n}" for n, size in at.items())


def report(found: dict[Job, dict[int, list[Cost]]], disk: float, given: argparse.Namespace) -> str:
    """One table: figures, and ratios to the cheapest peer of the same kind."""
    figures = {job: medians(costs, given.layers) for job, costs in found.items()}
    lines = []
    for job, mine in figures.items():
        others = [f for j, f in figures.items() if j.tool != "ours" and kind(j) == kind(job)]
        ratios = [f"{mine[m] / min(o[m] for o in others):.2f}" if others else "–" for m in MEASURES]
        sizes = [f"{mine['wall_s']:.1f}", f"{mine['cpu_s']:.1f}", peaks(found[job])]
        lines.append([job.tool, job.method, *(f"{s} ({r})" for s, r in zip(sizes, ratios, strict=True))])
    line = f"on the straight line through 1 and {given.layers} (nan: noise), memory at {given.layers}"
    how = "measured" if given.layers == FULL else line
    peers = ", ".join(f"{NAMES[p]} {version(p)}" for p in ("gptqmodel", "llmcompressor"))
    header = ["tool", "method", "wall s (× best peer)", "CPU s (× best peer)", "peak RSS MiB at layers (× best peer)"]
    return (
        f"Qwen3-0.6B shape, W4 group 128, {given.samples} × {given.sequence_length} tokens, {given.threads} threads, "
        f"28 layers {how}; medians of {given.repeat}. Peers: {peers}.\n\n{table(header, lines)}\n\n"
        f"Reading the source of {given.layers} layers from the disk and writing as much as the result: {disk:.1f} s.\n"
    )


def kind(job: Job) -> str:
    return "rtn" if job.method.startswith("rtn") else "gptq"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=FULL, help="another depth: times on the line through it and 1, at 28"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that one run may take")
    parser.add_argument("--only", nargs="+", metavar="TOOL:METHOD", help="for example ours:gptq-w4a16-g128")
    parser.add_argument("--output", type=Path, default=Path("cost.md"))
    given = parser.parse_args()
    if given.layers < 2:
        parser.error("--layers must be 2 or more")
    for tool in {job.tool for job in JOBS if wanted(job, given)} - {"ours"}:
        python_of(tool)
    text = report(*collect(given), given)
    given.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
