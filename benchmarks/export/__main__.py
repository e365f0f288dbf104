"""`python -m benchmarks.export`: time and memory of writing an ONNX folder, ours and onnxruntime-genai's builder's.

    fp32   16-bit model → fp32 activations
    int4   ours: a quantized folder's codes; the builder's: the 16-bit model, rounded on the way

Each run is a process of its own; the tools take turns. Seconds are of the processor, which other work does not
stretch, and of the wall; memory is the largest resident size. Two exports of ours must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.venvs import cache_folder
from benchmarks.runtime import machine, models
from qwen3_export.cli.console import table


@dataclass
class Cost:
    """What the runs of one tool took."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)


def measured(command: list[str], cost: Cost) -> None:
    """Run a command to its end and add what it took."""
    started = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    child = os.posix_spawn(command[0], command, os.environ, file_actions=silent)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with status {os.waitstatus_to_exitcode(status)}")
    cost.wall.append(time.perf_counter() - started)
    cost.processor.append(usage.ru_utime + usage.ru_stime)
    cost.peak.append(usage.ru_maxrss * 1024)


def digest(folder: Path) -> str:
    """Of the graph and its data."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("model.onnx*")):
        found.update(path.read_bytes())
    return found.hexdigest()


def ours(source: Path, output: Path) -> list[str]:
    code = "from qwen3_export.cli import main; main()"
    return [sys.executable, "-c", code, "onnx", str(source), "--output", str(output), "--force", "--quiet"]


def builder(source: Path, output: Path, kind: str) -> list[str]:
    options = ["-i", source, "-o", output, "-p", kind, "-e", "cpu", "-c", output.with_name("cache")]
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, options)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["fp32", "int4"], choices=["fp32", "int4"])
    given = parser.parse_args()
    base = cache_folder() / "runtime" / f"{given.layers}-{given.vocabulary}"
    source = models.checkpoint(base / "model", given.layers, given.vocabulary)
    sources = {"fp32": source, "int4": models.rounded(base, source, "int4") if "int4" in given.kinds else source}
    costs = {(tool, kind): Cost() for kind in given.kinds for tool in ("ours", "builder")}
    output = base / "export"
    if found := machine.warning():
        print(f"warning: {found}", file=sys.stderr)
    for _ in range(given.turns):
        for (tool, kind), cost in costs.items():
            shutil.rmtree(output, ignore_errors=True)
            command = ours(sources[kind], output) if tool == "ours" else builder(source, output, kind)
            measured(command, cost)
            cost.digests.add(digest(output))
    shutil.rmtree(output, ignore_errors=True)
    headers = ["export", "wall s", "processor s", "peak MB", "the builder's wall, processor", "bytes"]
    table(headers, [_row(tool, kind, costs) for tool, kind in costs])


def _row(tool: str, kind: str, costs: dict[tuple[str, str], Cost]) -> list[str]:
    cost, rival = costs[tool, kind], costs["builder", kind]
    ratios = [
        statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in ((cost.wall, rival.wall), (cost.processor, rival.processor))
    ]
    return [
        f"{tool} {kind}", f"{statistics.median(cost.wall):.1f}", f"{statistics.median(cost.processor):.1f}",
        f"{max(cost.peak) / 1e6:.0f}", "" if tool == "builder" else " ".join(f"{ratio:.1f} ×" for ratio in ratios),
        "equal" if len(cost.digests) == 1 else "differ",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
