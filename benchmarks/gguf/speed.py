"""`python -m benchmarks.gguf.speed`: tokens per second of every file type in llama.cpp.

Run it on an idle machine. The models are the reference model and a random one of Qwen3-0.6B's shape; files are rounded
to nearest, since speed depends on a type's bytes and kernels and not on its codes. A turn prefills a prompt and decodes
greedily after it; the figures are the best prefill and the median token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.cost.__main__ import FULL, checkpoint
from benchmarks.gguf.report import ORDER, Row, add, speed
from benchmarks.quality.checkpoints import make
from benchmarks.quality.venvs import cache_folder
from qwen3_export.core.source import open_source
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.gguf import export_gguf

PROMPT, NEW, TURNS = 128, 32, 2


def timed(path: Path, threads: int) -> dict[str, float]:
    """Tokens per second of prompts and of new tokens, after one short warm-up."""
    session = open_session(path, RuntimeOptions(threads=threads))
    ids = np.random.default_rng(0).integers(0, 8000, PROMPT).astype(np.int32)
    try:
        session.prefill(ids[:8])
        prompts, tokens = [], []
        for _ in range(TURNS):
            begin = time.perf_counter()
            token = int(session.prefill(ids)[-1].argmax())
            prompts.append(time.perf_counter() - begin)
            for _ in range(NEW):
                begin = time.perf_counter()
                token = int(session.decode(token).argmax())
                tokens.append(time.perf_counter() - begin)
    finally:
        session.close()
    return {"prefill": PROMPT / min(prompts), "decode": 1 / statistics.median(tokens)}


def measure(model: str, source: Path, types: list[str], threads: int) -> list[Row]:
    """One row per type; each file is deleted after its measurement."""
    folder, rows = cache_folder() / "gguf-speed", []
    folder.mkdir(parents=True, exist_ok=True)
    for type_name in types:
        path = folder / f"{type_name}.gguf"
        export_gguf(open_source(str(source)), path, type_name, force=True)
        size = path.stat().st_size
        found = timed(path, threads)
        path.unlink()
        about = {"bytes": size, "threads": threads, "prompt": PROMPT, "new": NEW * TURNS}
        rows.append({"model": model, "type": type_name, **about, **found})
        print(f"{model}  {type_name}: {found['decode']:.1f} tokens/s", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Without experts, mxfp4_moe is q8_0.
    types = [name for name in (*ORDER, "bf16") if name != "mxfp4_moe"]
    parser.add_argument("--types", nargs="+", default=types)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=FULL, help="layers of the random model; 0 leaves it out")
    parser.add_argument("--output", type=Path, help="JSON file that the rows are added to; FILE.md is written anew")
    given = parser.parse_args()
    rows = measure("reference-model", make("reference-model"), given.types, given.threads)
    if given.layers:
        shape = "shape of Qwen3-0.6B" if given.layers == FULL else f"shape of Qwen3-0.6B, {given.layers} layers"
        rows += measure(shape, checkpoint(given.layers), given.types, given.threads)
    if given.output:
        add(given.output, "speed", rows)
    print(speed(rows))


if __name__ == "__main__":
    main()
