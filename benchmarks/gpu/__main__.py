"""`python -m benchmarks.gpu`: GPTQ on one NVIDIA GPU, ours beside llm-compressor.

Slices with the exact widths of Qwen3-8B and Qwen3-30B-A3B, random weights, the same rows. Each run is a process of its
own. Ours runs twice, and its bytes are compared, and once without the GPU. Memory of the GPU is what nvidia-smi shows,
read twice a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.quality.process import Cost, run
from benchmarks.quality.report import table
from benchmarks.quality.runs import Setting, make_setting
from benchmarks.quality.venvs import PEERS
from benchmarks.scale.models import make_slice
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensor import QuantizedTensor

ROOT = Path(__file__).resolve().parents[2]
RECIPE, SCHEME, LENGTH = "gptq-w4a16-g128", "w4-g128", 512
SLICES = {"dense": ("8B", 2), "moe": ("30B-A3B", 1)}
WAYS = ("ours", "ours again", "llm-compressor", "ours, CPU")


def command(way: str, setting: Setting, output: Path, python: str) -> list[str | Path]:
    """The command line of one run."""
    if way == "llm-compressor":
        return [
            *(python, "-P", PEERS / "llmcompressor.py", "--model", setting.checkpoint, "--rows", setting.rows),
            *("--method", "gptq", "--scheme", SCHEME, "--output", output, "--result", output.with_suffix(".json")),
        ]
    return [
        *(sys.executable, "-c", "from qwen3_export.cli import main; main()", "quantize", setting.checkpoint),
        *("--recipe", RECIPE, "--output", output, "--calibration", setting.calibration, "--json", "--force"),
        *("--samples", str(setting.samples), "--sequence-length", str(setting.length), "--seed", "0"),
        *("--device", "cpu" if way == "ours, CPU" else "cuda"),
    ]


@contextmanager
def gpu_memory() -> Iterator[list[int]]:
    """Megabytes in use on the first GPU, largest so far, while the block runs."""
    query, most, done = (
        ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        [0],
        threading.Event(),
    )

    def watch() -> None:
        while not done.wait(0.5):
            most[0] = max(most[0], int(subprocess.run(query, capture_output=True, text=True).stdout or 0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def output_of(folder: Path, way: str) -> Path:
    """Where a run writes its folder."""
    return folder / way.replace(", ", "-").replace(" ", "-")


def same_codes(first: Path, second: Path) -> float:
    """The share of codes that two folders have in common."""
    one, other = open_checkpoint(first), open_checkpoint(second)
    equal = total = 0
    for name in one.schemes:
        a, b = one.linear(name), other.linear(name)
        assert isinstance(a, QuantizedTensor)
        assert isinstance(b, QuantizedTensor)
        equal, total = equal + int((a.codes == b.codes).sum()), total + a.codes.size
    return equal / total


def measure(name: str, folder: Path, given: argparse.Namespace) -> list[list[str]]:
    """The rows of one slice's table."""
    base, layers = SLICES[name]
    source = make_slice(folder / name, base, layers, vocab_size=8192)
    setting = make_setting(name, source, given.samples, LENGTH, None)
    costs: dict[str, tuple[Cost, int]] = {}
    for way in given.ways:
        output = output_of(folder, way)
        with gpu_memory() as most:
            try:
                gpu = {} if way == "ours, CPU" else {"CUDA_VISIBLE_DEVICES": "0"}
                asked = command(way, setting, output, given.python)
                path = {"PYTHONPATH": given.peer_path if way == "llm-compressor" else str(ROOT)}
                costs[way] = (run(asked, folder, given.threads, given.timeout, **path, **gpu), most[0])
            except RuntimeError as error:
                print(f"{name}, {way}: {error}", file=sys.stderr, flush=True)
                continue
        print(f"{name}, {way}: {costs[way]}", file=sys.stderr, flush=True)
    lines = []
    for way, (cost, memory) in costs.items():
        output = output_of(folder, way)
        against = "" if way in ("ours", "llm-compressor") else f"{same_codes(output_of(folder, 'ours'), output):.4%}"
        size = [f"{cost.wall_s:.1f}", f"{cost.cpu_s:.1f}", f"{memory}", f"{cost.peak_rss / 1e6:.0f}"]
        lines.append([f"{base}, {layers} layers", way, *size, against])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--slices", nargs="+", default=list(SLICES), choices=SLICES)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take")
    parser.add_argument("--python", default=sys.executable, help="the Python that has llm-compressor")
    parser.add_argument("--peer-path", default="", help="a folder with llm-compressor's packages, if it is elsewhere")
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    given = parser.parse_args()
    headers = ["slice", "run", "wall s", "processor s", "GPU MB", "peak RSS MB", "codes as ours on the GPU"]
    with tempfile.TemporaryDirectory(prefix="q3e-gpu-") as folder:
        lines = []
        for name in given.slices:
            lines += measure(name, Path(folder), given)
            text = f"{RECIPE}, {given.samples} × {LENGTH} tokens.\n\n{table(headers, lines)}\n"
            given.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
