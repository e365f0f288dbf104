"""`python -m benchmarks.export`: time and memory of our ONNX export and onnxruntime-genai's builder.

    fp32   16-bit model → fp32 activations
    int4   ours: a quantized folder's codes, and the KL of level 4 is measured; the builder's: the 16-bit model is
           rounded, and nothing is measured
    floor  the same bytes as fp32, read, hashed, written and hashed, and nothing else (`benchmarks.export.floor`)

Each run is a process of its own. The tools take turns, each turn begins with another, and pending writes are flushed
before the next one begins. The seconds are those of the processor, which other work hardly changes, and of the wall;
memory is the peak resident size. Two exports of ours must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality.process import Cost, run
from benchmarks.quality.report import table
from benchmarks.quality.venvs import cache_folder
from benchmarks.runtime import machine, models
from qwen3_export.core.manifest import sha256_file
from qwen3_export.prove.meters import MachineLoad

TOOLS, KINDS, MINUTES = ("ours", "builder"), ("fp32", "floor", "int4", "int4 level 0"), 10
# The kind whose export by the builder is compared with.
RIVALS = {"floor": "fp32", "int4 level 0": "int4"}
HEADERS = ["export", "wall s", "processor s", "peak MB", "of the builder's wall, processor", "two exports"]
# By tool and kind: the costs of each turn, and the hashes of the outputs.
Costs = Mapping[tuple[str, str], list[tuple[Cost, str]]]


def command(tool: str, source: Path, output: Path, kind: str) -> list[str | Path]:
    """The command line of a tool's export."""
    if kind == "floor":
        return [sys.executable, "-m", "benchmarks.export.floor", source, output]
    if tool == "ours":
        code = "from qwen3_export.cli import main; main()"
        level = ["--accuracy-level", "0"] if kind.endswith("level 0") else []
        return [sys.executable, "-c", code, "onnx", source, "--output", output, "--force", "--quiet", *level]
    options: list[str | Path] = ["-i", source, "-o", output, "-p", kind, "-e", "cpu", "-c", output.with_name("cache")]
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]


def digest(folder: Path) -> str:
    """Hash of the graph and its data."""
    return " ".join(sha256_file(path) for path in sorted(folder.glob("model.onnx*")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--make-only", action="store_true", help="make the sources, measure nothing")
    parser.add_argument("--output", type=Path, help="write the table into this Markdown file, too")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    base = cache_folder() / "runtime" / f"{given.layers}-{given.vocabulary}"
    model = models.checkpoint(base / "model", given.layers, given.vocabulary)
    sources = {
        kind: model if kind in ("fp32", "floor") else models.rounded(base, model, "edge-w4") for kind in given.kinds
    }
    if given.make_only:
        return
    if found := machine.warning():
        print(f"warning: {found}", file=sys.stderr)
    costs: Costs = {(tool, kind): [] for kind in given.kinds for tool in TOOLS if tool == "ours" or kind not in RIVALS}
    load = MachineLoad()
    take_turns(costs, sources, model, base / "export", given)
    others, lines = load.others() or 0.0, [_row(*key, costs) for key in costs]
    text = (
        f"`python -m benchmarks.export`: the shape of Qwen3-0.6B, {given.layers} layers, {given.vocabulary} tokens, "
        f"medians of {given.turns} turns, ratios turn by turn. {machine.describe(('onnxruntime-genai',))} Other work "
        f"took {others:.2f} processors meanwhile.\n\n{table(HEADERS, lines)}"
    )
    print(text)
    if given.output:
        given.output.write_text(f"# ONNX export: time and memory\n\n{text}\n", encoding="utf-8")


def take_turns(costs: Costs, sources: Mapping[str, Path], model: Path, base: Path, given: argparse.Namespace) -> None:
    """Have every tool export every kind, in turn.

    Each turn begins with another: what ran before leaves memory that is cheaper to have, or dearer.
    """
    order = list(costs.items())
    for turn in range(given.turns):
        first = turn % len(order)
        for (tool, kind), found in order[first:] + order[:first]:
            shutil.rmtree(base, ignore_errors=True)
            base.mkdir()
            os.sync()
            asked = command(tool, sources[kind] if tool == "ours" else model, base / "output", kind)
            cost = run(asked, base, given.threads, 60 * MINUTES, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
            found.append((cost, digest(base / "output")))
            print(f"turn {turn + 1}, {tool} {kind}: {cost.wall_s:.1f} s", file=sys.stderr)
    shutil.rmtree(base, ignore_errors=True)


def _row(tool: str, kind: str, costs: Costs) -> list[str]:
    mine = [own for own, _ in costs[tool, kind]]
    theirs = [] if tool == "builder" else [rival for rival, _ in costs.get(("builder", RIVALS.get(kind, kind)), [])]
    wall, processor = ([getattr(cost, name) for cost in mine] for name in ("wall_s", "cpu_s"))
    less = [
        statistics.median(getattr(rival, name) / getattr(own, name) for own, rival in zip(mine, theirs, strict=True))
        for name in ("wall_s", "cpu_s")
        if theirs
    ]
    return [
        kind if kind == "floor" else f"{tool} {kind}", f"{statistics.median(wall):.1f}",
        f"{statistics.median(processor):.1f}", f"{max(own.peak_rss for own in mine) / 1e6:.0f}",
        f"{less[0]:.1f} ×, {less[1]:.1f} × less" if less else "",
        "equal" if len({digest for _, digest in costs[tool, kind]}) == 1 else "differ",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
