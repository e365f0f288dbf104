"""`python -m benchmarks`: our ONNX Runtime session beside onnxruntime-genai on one folder."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen3_export import export, quantize
from qwen3_export.cli.console import table
from qwen3_export.run.ort import OrtSession
from qwen3_export.run.session import RuntimeOptions, greedy

PROMPT, NEW, TURNS = 128, 64, 7


def ours(folder: Path) -> Callable[[np.ndarray], list[int]]:
    """Greedy text by `run.ort`."""
    session = OrtSession(folder, RuntimeOptions())
    return lambda prompt: [int(token) for token in greedy(session, prompt, NEW)]


def genai(folder: Path) -> Callable[[np.ndarray], list[int]]:
    """Greedy text by onnxruntime-genai, same threads."""
    import onnxruntime_genai

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    model = onnxruntime_genai.Model(str(folder))

    def run(prompt: np.ndarray) -> list[int]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))[PROMPT:]

    return run


def main() -> None:
    """Export, time both in turn, and print medians and their ratio."""
    prompt = np.random.default_rng(0).integers(0, 8000, PROMPT).astype(np.int32)
    rows = []
    with tempfile.TemporaryDirectory() as base:
        quantize("reference-model", "rtn-w4a16-g32", Path(base) / "quantized")
        for name, source in (("fp32", "reference-model"), ("int4 g32", Path(base) / "quantized")):
            folder = Path(base) / name.replace(" ", "-")
            export(source, folder, "onnx")
            runners = {"ours": ours(folder), "genai": genai(folder)}
            seconds: dict[str, list[float]] = {key: [] for key in runners}
            for turn in range(TURNS + 1):
                for key, runner in runners.items():
                    started = time.perf_counter()
                    runner(prompt)
                    if turn > 0:
                        seconds[key].append(time.perf_counter() - started)
            medians = {key: statistics.median(values) for key, values in seconds.items()}
            ratio = medians["ours"] / medians["genai"]
            rows.append([name, f"{PROMPT} + {NEW}", *(f"{1000 * m:.1f}" for m in medians.values()), f"{ratio:.2f}"])
    table(["model", "tokens", "ours ms", "genai ms", "ours / genai"], rows)


if __name__ == "__main__":
    main()
