"""Results and reports as `validate` and `bench` write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen3_export.prove.statistics import SampleDrift, intervals, row_sums, statistics

RESULT: dict[str, Any] = {
    "artifact": "/some/where/model.gguf",
    "runtime": "llama.cpp",
    "runtime_version": "b1",
    "device": "cpu",
    "tokens": 100,
    "kl_mean": 0.01,
    "kl_ci95": [0.008, 0.012],
    "kl_p99": 0.2,
    "top1_agreement": 0.9,
    "ppl_reference": 15.0,
    "ppl_artifact": 15.3,
    "ppl_ratio": 1.02,
    "domains": {"code": {"tokens": 60, "kl_mean": 0.02, "top1_agreement": 0.8, "ppl_ratio": 1.1}},
    "generation": {"texts": 8, "agreement": 0.5, "loops": 3, "loops_reference": 2, "extra_loops": 1},
    "bytes": 1000,
    "statistics": {"kl": {"median": 0.004, "p99_9": 0.5, "max": 0.9}, "probability_change": {"rms": 0.03}},
    "sidecars": {"changed": 0},
    "flips": {"sure_from": 0.9, "sure_positions": 50, "flips": 1, "share": 0.01},
    "tasks": {"tasks": 60, "right_to_wrong": 2},
    "decode": {"tokens_per_second_p50": 20.0},
    "first_token": {"seconds_p50": 0.25},
    "peak_rss_bytes": 5_000_000,
    "experts": {"min_tokens": 64, "below_floor": 3, "floor": 128, "fallback": "share"},
}
ROWS, TOKENS = 40, 100


def drifts(scale: float = 1.0, seed: int = 0, rows: int = ROWS, shift: float = 0.0) -> list[SampleDrift]:
    """Rows whose hardness varies a hundredfold; `seed` moves the artifact's own noise only."""
    text, noise = np.random.default_rng(7), np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        hard = 10.0 ** text.uniform(-3, -1)
        kl = hard * scale * (1 + 0.02 * noise.standard_normal(TOKENS)) + shift
        base = -text.exponential(2.0, TOKENS)
        found.append(SampleDrift(kl, text.random(TOKENS) > 0.1, base, base - 0.01))
    return found


def result(found: list[SampleDrift], artifact: str = "/a/model.gguf", **changes: Any) -> dict[str, Any]:
    kl = np.concatenate([d.kl for d in found])
    values = {
        "artifact": artifact,
        "runtime": "llama.cpp",
        "runtime_version": "1",
        "device": "cpu",
        "bytes": 1000,
        "settings": {"exact": False, "threads": 1},
        "reference_sha256": "r",
        "text_sha256": "t",
        "kl_is_lower_bound": False,
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        **intervals(found),
        "top1_agreement": 0.9,
        "ppl_ratio": 1.01,
        "rows": row_sums(found, ["math" if i % 2 else "code" for i in range(len(found))]),
        "statistics": statistics(found),
    }
    return {**values, **changes}


def report(*results: dict[str, Any], cpu: str = "x") -> dict[str, Any]:
    return {"results": list(results), "passed": True, "environment": {"cpu": cpu}}


OLD = report(result(drifts()))


def speed(factor: float = 1.0, spread: float = 0.05, **changes: Any) -> dict[str, Any]:
    values = {
        "artifact": "m.gguf",
        "runtime": "llama.cpp",
        "device": "cpu",
        "threads": 1,
        "load_seconds": 1.0 * factor,
        "prefill": [
            {
                "prompt_tokens": 128,
                "tokens_per_second": 1280 / factor,
                "seconds_p50": 0.1 * factor,
                "seconds_p95": 0.1 * factor * (1 + spread),
            }
        ],
        "decode": {
            "per_token_seconds_p50": 0.01 * factor,
            "p95": 0.01 * factor * (1 + spread),
            "p99": 0.02,
            "tokens_per_second_p50": 100 / factor,
        },
        "peak_rss_bytes": 1000,
    }
    return {**values, **changes}
