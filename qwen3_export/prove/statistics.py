"""Statistics of drift over rows of scored positions, and their uncertainty.

A result has two kinds of uncertainty:

    ±  (`stderr`)   √((E[x²] − E[x]²) / (n − 1)) treats positions as independent, as
                    `llama-perplexity --kl-divergence` does; for comparison with its figures
    95 % interval   from resampled rows; it is wider, since positions of one row are not independent;
                    limits and baselines use this one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
# With fewer rows the resampled interval is too narrow.
MIN_ROWS = 5
# Student's t: 97.5 % lie below it, by number of rows.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182}
_TWO_SIDED = 1.96
_KL_QUANTILES = {
    "p99_9": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "p10": 0.1,
    "p5": 0.05,
    "p1": 0.01,
    "p0_1": 0.001,
}
_DELTA_QUANTILES = {**_KL_QUANTILES, "p75": 0.75, "p25": 0.25}
# Half decades from 1e-9 to 100 nats; smaller and larger values count in the outermost bins.
HISTOGRAM_EXPONENTS = tuple(x / 2 for x in range(-18, 5))


@dataclass(frozen=True)
class SampleDrift:
    """Drift at each scored position of one sample.

    KL, agreement of the top token, both models' log-probabilities of the next token, and whether the original is sure
    of its top token (`drift.SURE`). Where KL is an estimate, also its lower bound and its sampling variance.
    """

    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    reference_logprob: NDArray[np.float64]
    artifact_logprob: NDArray[np.float64]
    sure: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    kl_bound: NDArray[np.float64] | None = None
    kl_variance: NDArray[np.float64] | None = None


def resampled(counts: NDArray, *sums: NDArray) -> tuple[NDArray[np.float64], ...]:
    """Bootstrap means over rows, `[RESAMPLES]` for each of the row sums.

    All use the same draws, so that differences between them are paired.
    """
    draws = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    positions = counts[draws].sum(-1)
    return tuple(values[draws].sum(-1) / positions for values in sums)


def interval_of_few(counts: NDArray, difference: float, deviations: NDArray[np.float64]) -> list[float]:
    """The 95 % interval of a difference over few rows, by Student's t.

    There are 2 to 4 rows; `deviations` are what each row's sum, of `counts` positions, adds to the difference beyond
    its share of it.
    """
    rows = len(counts)
    error = np.sqrt(rows / (rows - 1) * (deviations**2).sum()) / counts.sum()
    half = float(_STUDENT[rows] * error)
    return [difference - half, difference + half]


def ends(values: NDArray[np.float64]) -> list[float]:
    """The 2.5th and 97.5th percentiles of some values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


def intervals(drifts: Sequence[SampleDrift]) -> dict[str, list[float]]:
    """95 % intervals of mean KL, top-1 agreement and perplexity ratio, `{name: [low, high]}`.

    With few rows, resampling gives too narrow an interval: then it is widened to that of independent positions.
    """
    counts = np.array([len(d.kl) for d in drifts])
    kinds = ("kl_ci95", "top1_ci95", "ppl_ratio_ci95")
    values = [
        [np.asarray(v, float) for v in (d.kl, d.same_top, d.reference_logprob - d.artifact_logprob)] for d in drifts
    ]
    found = {}
    for kind, parts in zip(kinds, zip(*values, strict=True), strict=True):
        low, high = ends(resampled(counts, np.array([part.sum() for part in parts]))[0])
        if len(counts) < MIN_ROWS:
            mean, error = mean_and_error(np.concatenate(parts))
            low, high = min(low, mean - _TWO_SIDED * error), max(high, mean + _TWO_SIDED * error)
        found[kind] = [float(np.exp(low)), float(np.exp(high))] if kind == "ppl_ratio_ci95" else [low, high]
    return found


def row_sums(drifts: Sequence[SampleDrift], domains: Sequence[str]) -> dict[str, list[Any]]:
    """Sums over the positions of every sample, for a later comparison with a baseline."""
    return {
        "domain": list(domains),
        "positions": [len(d.kl) for d in drifts],
        "kl": [float(d.kl.sum()) for d in drifts],
        "same_top": [int(d.same_top.sum()) for d in drifts],
        "reference_logprob": [float(d.reference_logprob.sum()) for d in drifts],
        "artifact_logprob": [float(d.artifact_logprob.sum()) for d in drifts],
    }


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error over independent positions; error 0 up to ten."""
    mean = float(values.mean())
    variance = float((values**2).mean()) - mean**2
    return mean, float(np.sqrt(variance / (len(values) - 1))) if variance > 0 and len(values) > 10 else 0.0


def statistics(drifts: Sequence[SampleDrift]) -> dict[str, Any]:
    """The statistics that `llama-perplexity --kl-divergence` of llama.cpp prints.

    `probability_change` is Δp: the artifact's probability of the text's next token less the original's.
    """
    kl = np.concatenate([d.kl for d in drifts])
    base = -np.concatenate([d.reference_logprob for d in drifts])
    ours = -np.concatenate([d.artifact_logprob for d in drifts])
    change = np.exp(-ours) - np.exp(-base)
    same = float(np.concatenate([d.same_top for d in drifts]).mean())
    mean, error = mean_and_error(kl)
    delta, delta_error = mean_and_error(change)
    return {
        "kl": {"mean": mean, "stderr": error, **_quantiles(kl, _KL_QUANTILES)},
        "probability_change": {
            "mean": delta,
            "stderr": delta_error,
            **_root_mean_square(change),
            **_quantiles(change, _DELTA_QUANTILES),
        },
        "same_top": {"mean": same, "stderr": float(np.sqrt(same * (1 - same) / max(len(kl) - 1, 1)))},
        **_perplexity(ours, base),
    }


def _quantiles(values: NDArray[np.float64], wanted: dict[str, float]) -> dict[str, float]:
    middle = {
        name: float(value) for name, value in zip(wanted, np.quantile(values, list(wanted.values())), strict=True)
    }
    return {"max": float(values.max()), **middle, "median": float(np.median(values)), "min": float(values.min())}


def _root_mean_square(values: NDArray[np.float64]) -> dict[str, float]:
    square, error = mean_and_error(values**2)
    root = float(np.sqrt(square))
    return {"rms": root, "rms_stderr": 0.5 / root * error if root else 0.0}


def _perplexity(ours: NDArray[np.float64], base: NDArray[np.float64]) -> dict[str, Any]:
    """Perplexities from negative log-probabilities, their ratio, difference and correlation."""
    (mean, error), (base_mean, base_error) = mean_and_error(ours), mean_and_error(base)
    count = len(ours)
    covariance = float((ours * base).mean() - mean * base_mean) / (count - 1) if count >= 10 else 0.0
    ratio = mean - base_mean
    ratio_error = float(np.sqrt(max(error**2 + base_error**2 - 2 * covariance, 0.0)))
    spread = error * base_error
    ppl, base_ppl = float(np.exp(mean)), float(np.exp(base_mean))
    together = ppl * base_ppl * covariance
    difference_error = float(np.sqrt(max((ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * together, 0.0)))
    return {
        "logprob_correlation": covariance / spread if spread else None,
        "log_ppl_ratio": {"mean": ratio, "stderr": ratio_error},
        "ppl_ratio": {"mean": float(np.exp(ratio)), "stderr": float(np.exp(ratio)) * ratio_error},
        "ppl_difference": {"mean": ppl - base_ppl, "stderr": difference_error},
        "ppl_artifact": {"mean": ppl, "stderr": ppl * error},
        "ppl_reference": {"mean": base_ppl, "stderr": base_ppl * base_error},
    }


def histogram(drifts: Sequence[SampleDrift]) -> dict[str, list[float]]:
    """Histogram of log10 KL in half decades: `{exponents [n + 1], counts [n]}`."""
    kl = np.concatenate([d.kl for d in drifts])
    exponents = np.array(HISTOGRAM_EXPONENTS)
    logs = np.log10(np.clip(kl, 10.0 ** exponents[0], None))
    counts, _ = np.histogram(np.clip(logs, exponents[0], exponents[-1]), exponents)
    return {"exponents": list(HISTOGRAM_EXPONENTS), "counts": [int(count) for count in counts]}
