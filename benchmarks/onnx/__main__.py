"""`python -m benchmarks.onnx`: KL of device recipes and onnxruntime-genai's builder in ONNX Runtime.

Every folder is made anew; `judge`, which imports nothing of this package, measures it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.quality.checkpoints import make
from benchmarks.quality.report import table
from qwen3_export import export, quantize

OURS = ("edge-w4", "edge-w4-mixed", "edge-w8")
# Name, precision and further options of the builder.
BUILDER = (
    ("builder int4", "int4", ()),
    ("builder int8", "int8", ()),
    ("builder k_quant_mixed", "int4", ("algo_config=k_quant_mixed",)),
)
# Our recipe → the builder's models that it is compared with.
PAIRS = {
    "edge-w4": ("builder int4",),
    "edge-w4-mixed": ("builder int4", "builder k_quant_mixed"),
    "edge-w8": ("builder int8",),
}
HEADERS = ["folder", "MB", "KL", "top-1", "KL beside", "bytes beside"]


def build(source: Path, output: Path, precision: str, options: tuple[str, ...]) -> None:
    """A folder of onnxruntime-genai's builder for a CPU, at accuracy level 4."""
    command = ["-i", source, "-o", output, "-p", precision, "-e", "cpu", "-c", output.parent / "cache"]
    extra = ["--extra_options", "int4_accuracy_level=4", "hf_token=false", *options]
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*module, *map(str, command), *extra], check=True, capture_output=True)


def measure(name: str, base: Path) -> list[dict[str, Any]]:
    """Make every folder of a checkpoint; what the judge prints of each."""
    source, folders = make(name), []
    for recipe in OURS:
        quantize(source, recipe, base / f"{recipe}-folder")
        export(base / f"{recipe}-folder", base / recipe, "onnx")
        folders.append(base / recipe)
    for label, precision, options in BUILDER:
        build(source, base / label, precision, options)
        folders.append(base / label)
    command = [sys.executable, "-m", "benchmarks.onnx.judge", source, *folders]
    printed = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table per checkpoint, with ratios to the builder's models of similar size."""
    names = ("onnxruntime", "onnxruntime-genai")
    text = (
        f"# ONNX for devices\n\nWritten by `benchmarks.onnx`. {', '.join(f'{n} {metadata.version(n)}' for n in names)}."
    )
    for checkpoint, rows in found.items():
        found_of = {row["folder"]: row for row in rows}
        ratios = {ours: [_beside(found_of, ours, theirs) for theirs in PAIRS[ours]] for ours in PAIRS}
        lines = [
            [row["folder"], f"{row['bytes'] / 1e6:.2f}", f"{row['kl']:.5f} ± {row['standard_error']:.5f}",
             f"{row['top1']:.1%}", *map(", ".join, zip(*ratios.get(row["folder"], [("", "")]), strict=True))]
            for row in rows
        ]  # fmt: skip
        text += f"\n\n## {checkpoint}\n\n{table(HEADERS, lines)}"
    return text + "\n"


def _beside(rows: dict[str, dict[str, Any]], ours: str, theirs: str) -> tuple[str, str]:
    """Both ratios to the builder's model: of KL and of bytes."""
    kl, size = (rows[ours][key] / rows[theirs][key] for key in ("kl", "bytes"))
    return f"{kl:.2f} × {theirs}", f"{size:.2f} ×"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx", description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", default=["reference-model", "outliers"])
    parser.add_argument("--output", type=Path, default=Path("onnx.md"))
    given = parser.parse_args()
    found = {}
    for name in given.checkpoint:
        with tempfile.TemporaryDirectory() as base:
            found[name] = measure(name, Path(base))
    given.output.write_text(report(found), encoding="utf-8")
    print(given.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
