"""The bootstrap interval of a mean over rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from qwen3_export.prove.statistics import SampleDrift, intervals


def bootstrap(sample: list[SampleDrift]) -> tuple[float, float]:
    low, high = intervals(sample)["kl_ci95"]
    return low, high


def drifts(rows: int, seed: int = 0, tokens: int = 20) -> Iterator[SampleDrift]:
    random = np.random.default_rng(seed)
    for _ in range(rows):
        kl, ones = random.exponential(random.uniform(0, 2), tokens), np.ones(tokens)
        yield SampleDrift(kl, ones > 0, ones, ones)


def test_the_interval_holds_the_mean_and_has_the_width_of_the_row_means() -> None:
    sample = list(drifts(400))
    low, high = bootstrap(sample)
    means = np.array([row.kl.mean() for row in sample])
    assert low < means.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * means.std() / np.sqrt(len(means)), rel=0.15)
    assert bootstrap(sample) == (low, high)


def test_the_interval_of_equal_rows_has_no_width() -> None:
    low, high = bootstrap(list(drifts(1)) * 5)
    assert low == pytest.approx(high) == pytest.approx(next(iter(drifts(1))).kl.mean())


def test_rows_of_unlike_length_weigh_as_their_tokens() -> None:
    short, long = SampleDrift(*(np.full(1, 100.0),) * 4), SampleDrift(*(np.zeros(99),) * 4)
    low, high = bootstrap([short] + [long] * 99)
    # One token in a hundred rows of 99: were rows weighed alike, the mean would be 1.
    assert low == 0
    assert high == pytest.approx(3 * 100 / (97 * 99 + 3), rel=0.5)
