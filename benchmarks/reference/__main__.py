"""How near a reference file comes to the full KL, by its top k.

    python -m benchmarks.reference [--recipe RECIPE] [--tokens N]

The embedded model is compared with its quantized copy. Bytes are those of a reference file with 32 rows of 256
positions and a vocabulary of 151,936.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_export import quantize
from qwen3_export.cli.console import table
from qwen3_export.core.source import open_source
from qwen3_export.prove.drift import sample_drift
from qwen3_export.prove.reference import answer_specs, full_truth, partial_truth, top_of
from qwen3_export.prove.statistics import SampleDrift
from qwen3_export.prove.validate import held_out
from qwen3_export.run.artifact import open_session

COUNTS = (8, 16, 32, 64, 128, 256, 512)
POSITIONS, VOCABULARY = 32 * 256, 151_936


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="rtn-w4a16-g128")
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    source = open_source("reference-model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "quantized"
        quantize("reference-model", options.recipe, folder)
        original, artifact = open_session(source.folder), open_session(folder)
        whole: list[NDArray[np.float64]] = []
        drifts: dict[int, list[SampleDrift]] = {k: [] for k in COUNTS}
        for ids in held_out(source.folder, tokens=options.tokens).ids:
            truth, logits = full_truth(original.prefill(ids), ids), artifact.prefill(ids)
            whole.append(sample_drift(truth, logits, ids).kl)
            for k, found in drifts.items():
                found.append(sample_drift(partial_truth(top_of(truth, k, ids)), logits, ids))
    full = np.concatenate(whole)
    rows = []
    for k, found in drifts.items():
        bound = np.concatenate([drift.kl_bound for drift in found if drift.kl_bound is not None])
        estimate = np.concatenate([drift.kl for drift in found]).mean()
        variances = [drift.kl_variance for drift in found if drift.kl_variance is not None]
        error = math.sqrt(sum(variance.sum() for variance in variances)) / len(full)
        specs = answer_specs(POSITIONS, k, VOCABULARY).values()
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs)
        shares = [f"{100 * value / full.mean():.2f} %" for value in (bound.mean(), estimate, error)]
        rows.append([str(k), *shares, f"{(bound - full).max():.1e}", f"{size / 1e6:.1f} MB"])
    print(f"{options.recipe}: KL {full.mean():.6f} over {len(full)} positions")
    table(["k", "proven bound", "estimate", "its standard error", "bound less KL, at most", "bytes"], rows)


if __name__ == "__main__":
    main()
