"""Memory, disk, time and sizes that `plan` predicts, beside those of real runs.

    python -m benchmarks.plan [--checkpoint NAME …] [--recipe NAME …] [--layers N] [--threads N] [--clock cpu|wall]

Each run is a process of its own, and so is `plan`, which comes first. On a busy machine compare processor seconds of
one thread (`--clock cpu`, the default), on an idle one wall seconds (`--clock wall --threads 2`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cost.__main__ import checkpoint as slice_of
from benchmarks.quality.checkpoints import MAKERS, make
from benchmarks.quality.process import environment, high_water
from benchmarks.quality.venvs import cache_folder
from benchmarks.scale.measure import used
from qwen3_export.cli.console import table

COMMAND = "from qwen3_export.cli import main; main()"
# Runs `plan` with its trial timed by the processor's clock, which other work does not stretch.
ON_CPU = "import time; time.perf_counter = time.process_time; "
RECIPES = ("rtn-w4a16-g128", "gptq-w4a16-g128", "gptq-max-w4a16-g128", "awq-w4a16-g128", "gguf-q4_k_m", "edge-w4")
EXPORTS = {
    "onnx": ("onnx",),
    "onnx-standard": ("onnx", "--flavor", "standard"),
    "gguf": ("gguf",),
    "tensorrt": ("tensorrt", "--sm", "8.9"),
}


@dataclass(frozen=True)
class Run:
    """Cost of a real run: seconds, peak memory, peak disk and output size."""

    seconds: float
    memory: int
    disk: int
    size: int


def command(*arguments: object, prefix: str = "") -> list[str]:
    return [sys.executable, "-c", prefix + COMMAND, *map(str, arguments)]


def real(words: Sequence[str], output: Path, options: argparse.Namespace) -> Run:
    """Run and measure a command that writes `output`, which is kept."""
    started, memory, disk = time.monotonic(), 0, 0
    with open(output.with_name(f"{output.name}.log"), "wb") as log:
        process = subprocess.Popen(words, env=environment(options.threads, {}), stdout=log, stderr=log)
        while True:
            memory = max(memory, high_water(process.pid))
            disk = max(disk, sum(map(stored, output.parent.glob(f"*{output.name}*"))))
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
    if status:
        raise SystemExit(Path(log.name).read_text(errors="replace")[-800:])
    spent = usage.ru_utime + usage.ru_stime if options.clock == "cpu" else time.monotonic() - started
    return Run(spent, memory, disk, stored(output))


def stored(path: Path) -> int:
    """Disk space of a file, or of a folder whose files may vanish meanwhile."""
    if path.is_dir():
        return used(path)
    with suppress(FileNotFoundError):
        return 512 * path.stat().st_blocks
    return 0


def planned(source: Path, recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """The predictions of `plan`, its trial timed by the chosen clock."""
    words = command(
        *("plan", source, "--recipe", recipe, "--json", "--quiet", "--threads", options.threads),
        prefix=ON_CPU if options.clock == "cpu" else "",
    )
    done = subprocess.run(words, env=environment(options.threads, {}), capture_output=True, text=True, check=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def ratio(said: float | None, took: float) -> str:
    return "-" if said is None else f"{said / took:.2f}"


def row(name: str, recipe: str, step: str, said: tuple[float | None, ...], run: Run) -> list[str]:
    """A row of measured memory, disk, seconds and size, predicted ÷ measured in brackets."""
    took = (run.memory, run.disk, run.seconds, run.size)
    shown = (
        f"{run.memory / 2**20:.0f} MiB",
        f"{run.disk / 2**20:.0f} MiB",
        f"{run.seconds:.1f} s",
        f"{run.size / 1e6:.1f} MB",
    )
    columns = zip(shown, said, took, strict=True)
    return [name, recipe, step, *(f"{text} ({ratio(plan, measured)})" for text, plan, measured in columns)]


def rows(name: str, source: Path, recipe: str, options: argparse.Namespace) -> Iterator[list[str]]:
    """Quantizing, then every format that takes the result."""
    folder = cache_folder() / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    said = planned(source, recipe, options)
    formats = said["formats"]
    quantized = folder / "quantized"
    run = real(
        command("quantize", source, "--recipe", recipe, "--output", quantized, "--threads", options.threads),
        quantized,
        options,
    )
    layout = next(n for n in ("compressed-tensors", "ggml", "fp8") if formats[n]["supported"])
    size = formats[layout]["bytes"]
    yield row(name, recipe, "quantize", (said["peak_rss_bytes"], said["disk_bytes"], said["seconds"], size), run)
    for step in options.export if options.export is not None else EXPORTS:
        found = formats[step]
        if not found["supported"]:
            continue
        output = folder / (f"{step}.gguf" if step == "gguf" else step)
        kind, *rest = EXPORTS[step]
        run = real(command(kind, quantized, "--output", output, *rest), output, options)
        yield row(name, recipe, step, (found.get("peak_rss_bytes"), None, None, found["bytes"]), run)
    shutil.rmtree(folder)


def main() -> None:
    """Print the table, one recipe after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", nargs="+", choices=MAKERS, default=["reference-model", "moe"])
    parser.add_argument("--layers", type=int, help="also a model of this many layers as wide as Qwen3-0.6B")
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--export", nargs="*", choices=EXPORTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    options = parser.parse_args()
    sources = {name: make(name) for name in options.checkpoint}
    if options.layers:
        sources[f"0.6B shape, {options.layers} layers"] = slice_of(options.layers)
    found = []
    for name, source in sources.items():
        for recipe in options.recipe:
            for line in rows(name, source, recipe, options):
                print(*line, sep="  ", file=sys.stderr, flush=True)
                found.append(line)
    table(["checkpoint", "recipe", "step", "memory (plan)", "disk (plan)", "time (plan)", "size (plan)"], found)


if __name__ == "__main__":
    main()
