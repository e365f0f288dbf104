"""`python -m benchmarks.gguf`: file type × size × KL × top-1 × tokens per second, in llama.cpp itself.

KL(original ‖ file) in nats per token and top-1 agreement over held-out text, the original run by transformers; decoding
speed of greedy tokens after a short prompt. One process measures all files, in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf.files import WAYS, Bench, wanted
from benchmarks.quality.checkpoints import MAKERS, make
from benchmarks.quality.report import table
from benchmarks.quality.venvs import cache_folder
from qwen3_export.core.gguf_types import FILE_TYPES
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions, Session
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import heldout_samples
from qwen3_export.text.tokenizer import ModelTokenizer

PROMPT, NEW = 32, 32


def heldout(source: Path, length: int, count: int | None) -> list[np.ndarray]:
    """Held-out samples, evenly taken when only some are asked for."""
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


def speed(session: Session, ids: np.ndarray) -> float:
    """Tokens per second of decoding, the median of single tokens."""
    token, seconds = int(session.prefill(ids[:PROMPT])[-1].argmax()), []
    for _ in range(NEW):
        begin = time.perf_counter()
        token = int(session.decode(token).argmax())
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds)


def collect(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every file of every checkpoint."""
    found = []
    for name in given.checkpoints:
        source, folder = make(name), cache_folder() / "gguf" / name
        folder.mkdir(parents=True, exist_ok=True)
        samples = heldout(source, given.sequence_length, given.heldout)
        answers = truth(source, samples, folder / f"truth-{given.sequence_length}-{len(samples)}.npy")
        bench = Bench(source, folder, given.samples, given.sequence_length)
        for type_name, way in wanted(given.types, given.ways):
            path = bench.make(way, type_name)
            if path is None:
                continue
            session = open_session(path, RuntimeOptions(threads=given.threads))
            row = {"checkpoint": name, "type": type_name, "way": way, "bytes": path.stat().st_size}
            row |= measure(session, samples, answers)
            row["tokens_per_second"] = speed(session, samples[0]) if given.speed else None
            session.close()
            path.unlink()
            found.append(row)
            print(f"{name}  {type_name}  {way}: KL {row['kl']:.5f}", file=sys.stderr, flush=True)
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """One table per checkpoint; KL also relative to llama.cpp's file of the type, with a matrix where there is one."""
    parts = []
    for name in dict.fromkeys(row["checkpoint"] for row in found):
        rows = [row for row in found if row["checkpoint"] == name]
        theirs = {row["type"]: row["kl"] for row in rows if row["way"] == "llama.cpp"}
        theirs |= {row["type"]: row["kl"] for row in rows if row["way"] == "llama.cpp imatrix"}
        lines = [_line(row, theirs.get(row["type"])) for row in rows]
        header = ["type", "made by", "MB", "KL", "± ", "× llama.cpp's best", "top-1", "tokens/s"]
        parts.append(f"## {name}\n\n{table(header, lines)}\n")
    return "\n".join(parts)


def _line(row: dict[str, Any], best: float | None) -> list[str]:
    rate = row["tokens_per_second"]
    return [
        row["type"],
        row["way"],
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['kl']:.5f}",
        f"{row['kl_error']:.5f}",
        "-" if best is None else f"{row['kl'] / best:.2f}",
        f"{row['top1']:.1%}",
        "-" if rate is None else f"{rate:.0f}",
    ]


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
    parser.add_argument("--speed", action="store_true", help="measure decoding too; wants an idle machine")
    parser.add_argument(
        "--keep", action="store_true", help="keep the 16-bit file, the matrix and the original's answers"
    )
    parser.add_argument("--output", type=Path, help="folder for results.json and results.md")
    given = parser.parse_args()
    found = collect(given)
    print(markdown(found))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.output / "results.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
