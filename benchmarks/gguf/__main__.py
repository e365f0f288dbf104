"""`python -m benchmarks.gguf`: file type × size × KL × top-1, in llama.cpp itself.

KL(original ‖ file) in nats per token and top-1 agreement over held-out text; transformers runs the original. For a
solved folder the KL is measured in torch too, with exact inputs: the difference is llama.cpp's rounding of inputs. One
process measures all files, in turn. `benchmarks.gguf.speed` and `.cost` add to the same results.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf.files import SOLVED, WAYS, Bench, wanted
from benchmarks.gguf.report import add, quality
from benchmarks.quality.checkpoints import MAKERS, make
from benchmarks.quality.venvs import cache_folder
from qwen3_export.core.gguf_types import FILE_TYPES
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions, Session
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import heldout_samples
from qwen3_export.text.tokenizer import ModelTokenizer


def heldout(source: Path, length: int, count: int | None) -> list[np.ndarray]:
    """Held-out samples; with a `count`, so many, spread evenly."""
    samples = heldout_samples(ModelTokenizer(source), load_documents("heldout"), length).ids
    step = 1 if count is None else max(len(samples) // count, 1)
    return list(samples)[::step][:count]


def truth(source: Path, samples: list[np.ndarray], cache: Path) -> np.ndarray:
    """The original's log-probabilities of all positions, by transformers."""
    from benchmarks.quality.evaluate import original

    return original(source, samples, cache)


def measure(session: Session, samples: list[np.ndarray], wanted: np.ndarray) -> dict[str, float]:
    """Mean KL with its standard error over samples, and top-1 agreement."""
    kl, same, begin = [], [], 0
    for ids in samples:
        logits = session.prefill(ids)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        p = np.array(wanted[begin : begin + len(ids) - 1], np.float64)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        begin += len(ids) - 1
    means = [float(part.mean()) for part in kl]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {"kl": float(np.concatenate(kl).mean()), "kl_error": error, "top1": float(np.concatenate(same).mean())}


def collect(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make and measure every file of every checkpoint."""
    for name in given.checkpoints:
        source, folder = make(name), cache_folder() / "gguf" / name
        folder.mkdir(parents=True, exist_ok=True)
        samples = heldout(source, given.sequence_length, given.heldout)
        answers = truth(source, samples, folder / f"truth-{given.sequence_length}-{len(samples)}.npy")
        bench = Bench(source, folder, given.samples, given.sequence_length)
        run = {"samples": given.samples, "sequence_length": given.sequence_length, "positions": len(answers)}
        for type_name, way in wanted(given.types, given.ways):
            path = bench.make(way, type_name)
            if path is None:
                continue
            row = {"checkpoint": name, "type": type_name, "way": way, "bytes": path.stat().st_size, **run}
            row |= measured(path, samples, answers, given.threads)
            if way == SOLVED:
                row["kl_torch"] = measured(bench.solved(type_name), samples, answers, given.threads)["kl"]
            path.unlink()
            print(f"{name}  {type_name}  {way}: KL {row['kl']:.5f}", file=sys.stderr, flush=True)
            yield row
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measured(artifact: Path, samples: list[np.ndarray], answers: np.ndarray, threads: int) -> dict[str, float]:
    """KL and top-1 of a file in llama.cpp, or of a folder in torch."""
    session = open_session(artifact, RuntimeOptions(threads=threads))
    try:
        return measure(session, samples, answers)
    finally:
        session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = [name for name in FILE_TYPES if name not in ("f16", "bf16", "q2_0")]
    parser.add_argument("--checkpoints", nargs="+", choices=MAKERS, default=["reference-model"])
    parser.add_argument("--types", nargs="+", choices=types, default=types)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--heldout", type=int, help="held-out samples (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--keep", action="store_true", help="keep the 16-bit file, the matrix and the original's answers"
    )
    parser.add_argument("--output", type=Path, help="JSON file that the rows are added to; FILE.md is written anew")
    given = parser.parse_args()
    found = []
    for row in collect(given):
        found.append(row)
        if given.output:
            add(given.output, "quality", [row])
    print(quality(found))


if __name__ == "__main__":
    main()
