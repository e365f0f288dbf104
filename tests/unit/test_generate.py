"""Choosing the next token: the most likely one, or draws whose frequencies are the nucleus' own."""

from __future__ import annotations

import numpy as np
import pytest

from qwen3_export.run.generate import Sampling, choose

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))


def frequencies(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    random = np.random.default_rng(sampling.seed)
    return np.bincount([choose(LOGITS, sampling, random) for _ in range(draws)], minlength=5) / draws


def test_without_temperature_the_most_likely_token_is_taken() -> None:
    assert frequencies(Sampling(temperature=0), 10).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.9, [1, 2, 3, 4]), (0.8, [1, 2, 3]), (0.5, [1, 3]), (0.01, [1])]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_nucleus(top_p: float, kept: list[int], temperature: float) -> None:
    sharpened = np.exp(LOGITS.astype(np.float64)) ** (1 / temperature)
    sharpened /= sharpened.sum()
    order = np.argsort(-sharpened)
    smallest = next(n for n in range(1, 6) if n == 5 or sharpened[order[:n]].sum() > top_p)
    if temperature == 1:
        assert sorted(order[:smallest].tolist()) == kept
    wanted = np.zeros(5)
    wanted[order[:smallest]] = sharpened[order[:smallest]] / sharpened[order[:smallest]].sum()
    np.testing.assert_allclose(frequencies(Sampling(temperature=temperature, top_p=top_p)), wanted, atol=0.03)


def test_the_seed_decides_the_draws() -> None:
    first, again, other = (frequencies(Sampling(temperature=1, seed=seed), 50) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([1e30, 0, -1e30], np.float32)
    assert choose(logits, Sampling(temperature=0.5), np.random.default_rng(0)) == 0
