"""The statistics of `llama-perplexity --kl-divergence`, against its formulas written out position by position.

The formulas are those of tools/perplexity/perplexity.cpp in ggml-org/llama.cpp: running sums over positions,
`mean_and_uncertainty`, `covariance`, a sorted list and its linear percentiles. The program keeps the original's
log-probabilities in 16 bits and leaves out tokens below e^-16: the test gives both sides what is kept.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qwen3_export.core.source import open_source
from qwen3_export.prove.drift import sample_drift
from qwen3_export.prove.reference import Truth
from qwen3_export.prove.statistics import SampleDrift, histogram, mean_and_error, statistics
from qwen3_export.prove.validate import held_out
from qwen3_export.run.artifact import open_session
from qwen3_export.ship.gguf import export_gguf

Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


def kept(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of one position as the program's base file keeps them: 16 bits between two floats."""
    top = logits.max()
    bottom = max(logits.min(), top - 16)
    log_sum = math.log(np.exp((logits - top).astype(np.float64)).sum())
    scale = (top - bottom) / 65535
    steps = np.where(logits > bottom, np.rint((logits - bottom) / scale), 0)
    return (scale * steps + (bottom - top - log_sum)).astype(np.float64)


class LlamaPerplexity:
    """The program's sums, one position after the other."""

    def __init__(self) -> None:
        self.nll, self.base, self.kl, self.change, self.same = [], [], [], [], []

    def add(self, logits: np.ndarray, base: np.ndarray, token: int) -> None:
        wide = logits.astype(np.float64)
        log_sum = wide.max() + math.log(np.exp(wide - wide.max()).sum())
        nll, nll_base = log_sum - wide[token], -base[token]
        counted = base > -16
        self.kl.append(float((np.exp(base[counted]) * (base[counted] - wide[counted] + log_sum)).sum()))
        self.nll.append(nll)
        self.base.append(nll_base)
        self.change.append(math.exp(-nll) - math.exp(-nll_base))
        self.same.append(int(wide.argmax()) == int(base.argmax()))

    @staticmethod
    def mean_and_uncertainty(values: list[float]) -> tuple[float, float]:
        count = len(values)
        mean = sum(values) / count
        variance = sum(v * v for v in values) / count - mean * mean
        return mean, math.sqrt(variance / (count - 1)) if variance > 0 and count > 10 else 0.0

    @staticmethod
    def percentile(values: list[float], fraction: float) -> float:
        ordered = sorted(values)
        place = fraction * (len(ordered) - 1)
        below = int(place)
        weight = place - below
        return (1 - weight) * ordered[below] + weight * ordered[min(below + 1, len(ordered) - 1)]

    def printed(self) -> dict[str, float]:
        """Every line of its report, by the name in our result."""
        count = len(self.kl)
        nll, base = self.mean_and_uncertainty(self.nll), self.mean_and_uncertainty(self.base)
        both = sum(a * b for a, b in zip(self.nll, self.base, strict=True)) / count
        covariance = (both - nll[0] * base[0]) / (count - 1)
        ratio, ratio_error = nll[0] - base[0], math.sqrt(nll[1] ** 2 + base[1] ** 2 - 2 * covariance)
        ppl, base_ppl = math.exp(nll[0]), math.exp(base[0])
        spread = (ppl * nll[1]) ** 2 + (base_ppl * base[1]) ** 2 - 2 * ppl * base_ppl * covariance
        square = self.mean_and_uncertainty([v * v for v in self.change])
        same = sum(self.same) / count
        lines = {
            "ppl_artifact.mean": math.exp(nll[0]),
            "ppl_artifact.stderr": math.exp(nll[0]) * nll[1],
            "ppl_reference.mean": math.exp(base[0]),
            "ppl_reference.stderr": math.exp(base[0]) * base[1],
            "logprob_correlation": covariance / (nll[1] * base[1]),
            "log_ppl_ratio.mean": ratio,
            "log_ppl_ratio.stderr": ratio_error,
            "ppl_ratio.mean": math.exp(ratio),
            "ppl_ratio.stderr": math.exp(ratio) * ratio_error,
            "ppl_difference.mean": ppl - base_ppl,
            "ppl_difference.stderr": math.sqrt(spread),
            "probability_change.rms": math.sqrt(square[0]),
            "probability_change.rms_stderr": 0.5 / math.sqrt(square[0]) * square[1],
            "same_top.mean": same,
            "same_top.stderr": math.sqrt(same * (1 - same) / (count - 1)),
        }
        for name, values in (("kl", self.kl), ("probability_change", self.change)):
            mean, error = self.mean_and_uncertainty(values)
            lines |= {f"{name}.mean": mean, f"{name}.stderr": error}
            lines |= {f"{name}.max": max(values), f"{name}.min": min(values)}
            tens = {"p99_9": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5}
            tens |= {"p10": 0.1, "p5": 0.05, "p1": 0.01, "p0_1": 0.001}
            tens |= {"p75": 0.75, "p25": 0.25} if name == "probability_change" else {}
            lines |= {f"{name}.{key}": self.percentile(values, fraction) for key, fraction in tens.items()}
        return lines


def flat(values: dict, prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> list[Answers]:
    """Token ids, the original's logits and those of a q8_0 file, both from llama.cpp, for held-out samples."""
    folder = tmp_path_factory.mktemp("statistics")
    source = open_source("reference-model")
    for kind in ("f16", "q8_0"):
        export_gguf(source, folder / f"{kind}.gguf", kind)
    rows, answers = held_out(source.folder, tokens=1024).ids, []
    for name in ("f16", "q8_0"):
        session = open_session(folder / f"{name}.gguf")
        answers.append([session.prefill(ids) for ids in rows])
        session.close()
    return list(zip(rows, *answers, strict=True))


@pytest.mark.slow
def test_every_line_of_llama_perplexity_is_the_same(logits: list[Answers]) -> None:
    theirs, drifts = LlamaPerplexity(), []
    for ids, original, ours in logits:
        base = np.stack([kept(row) for row in original[:-1]])
        # The next token's probability counts however small it is; only KL leaves out the tail.
        for position, token in enumerate(ids[1:]):
            theirs.add(ours[position], base[position], int(token))
        next_logprob = np.take_along_axis(base, ids[1:, None].astype(np.int64), 1)[:, 0]
        base = np.where(base > -16, base, -200.0)
        drifts.append(sample_drift(Truth(base.astype(np.float32), next_logprob.astype(np.float32)), ours, ids))
    found, wanted = flat(statistics(drifts)), theirs.printed()
    assert set(found) == set(wanted)
    # Ours keeps log-probabilities in fp32 and takes their differences there.
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert len(theirs.kl) > 900
    assert found["kl.max"] > found["kl.p99_9"] > found["kl.p99"] > found["kl.median"] > 0


def test_given_the_same_positions_the_statistics_are_the_same_to_rounding() -> None:
    random = np.random.default_rng(5)
    theirs, drifts = LlamaPerplexity(), []
    for length in (1, 40, 77, 300):
        base = -random.exponential(2.0, length)
        ours = base - random.standard_normal(length) * 0.1
        kl, same = random.exponential(0.01, length), random.random(length) < 0.9
        drifts.append(SampleDrift(kl, same, base, ours))
        theirs.kl += list(kl)
        theirs.same += list(same)
        theirs.nll += list(-ours)
        theirs.base += list(-base)
        theirs.change += list(np.exp(ours) - np.exp(base))
    assert flat(statistics(drifts)) == pytest.approx(theirs.printed(), rel=1e-9, abs=1e-12)


def test_nothing_to_estimate_gives_no_error_and_no_correlation() -> None:
    assert mean_and_error(np.full(10, 3.0)) == (3.0, 0.0)
    constant = SampleDrift(np.zeros(20), np.ones(20, bool), np.full(20, -1.0), np.full(20, -1.0))
    found = statistics([constant])
    assert found["logprob_correlation"] is None
    assert found["probability_change"]["rms"] == found["probability_change"]["rms_stderr"] == 0
    assert found["ppl_ratio"] == {"mean": 1.0, "stderr": 0.0}


def test_the_histogram_counts_every_position_once() -> None:
    row = SampleDrift(*(np.zeros(0),) * 4)
    kl = np.array([0.0, -1e-12, 1e-12, 2e-9, 0.5, 0.5, 1.0, 5000.0])
    counted = histogram([replace(row, kl=kl[:3]), replace(row, kl=kl[3:])])
    assert len(counted["exponents"]) == len(counted["counts"]) + 1
    assert sum(counted["counts"]) == len(kl)
    by_bin = dict(zip(counted["exponents"], counted["counts"], strict=False))
    assert (by_bin[-9.0], by_bin[-0.5], by_bin[0.0], by_bin[1.5]) == (4, 2, 1, 1)
