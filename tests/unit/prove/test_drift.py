"""Drift between two models against plain fp64 sums over their distributions.

Both models are Markov chains: a table of logits by the last token is the whole model, so every
number of a validation can be computed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.progress import Progress
from qwen3_export.errors import InputError
from qwen3_export.prove.drift import measure, sample_drift
from qwen3_export.prove.generation import loops
from qwen3_export.prove.reference import Continuations, Truth, full_truth, log_softmax, top_of
from qwen3_export.prove.tasks import Task
from qwen3_export.text.samples import Samples

VOCAB = 97


def table(seed: int, noise: float = 1.0, base: np.ndarray | None = None) -> np.ndarray:
    """Logits `[token, next token]`: fresh ones, or those of `base` with noise added."""
    values = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * noise
    return (values * 3 if base is None else base + values).astype(np.float32)


ORIGINAL = table(0)
QUANTIZED = table(1, 0.3, ORIGINAL)


class Markov:
    """A session whose logits depend on the last token only."""

    runtime, version, device, threads = "markov", "1", "cpu", 1

    def __init__(self, logits: np.ndarray, context: int = 1000, padding: int = 0) -> None:
        self.logits = np.pad(logits, [(0, 0), (0, padding)], constant_values=1e9)
        self.vocab_size, self.context = VOCAB + padding, context

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self.logits[ids]

    def decode(self, token: int) -> np.ndarray:
        return self.logits[token]

    def close(self) -> None:
        """Nothing to free."""


def greedy(logits: np.ndarray, token: int, count: int) -> list[int]:
    text = []
    for _ in range(count):
        token = int(logits[token].argmax())
        text.append(token)
    return text


class Chain:
    """A reference whose truths are those of a table, full or only the k most likely tokens."""

    vocab_size, source_sha256 = VOCAB, "chain"

    def __init__(self, rows: Samples, top_k: int | None = None, new_tokens: int = 6) -> None:
        self.samples, self.top_k = rows, top_k
        self.is_lower_bound = top_k is not None
        prompts = tuple(ids[:3] for ids in rows.ids[:4])
        texts = [greedy(ORIGINAL, int(prompt[-1]), new_tokens) for prompt in prompts]
        self.continuations, self.chats = Continuations(prompts, np.array(texts, np.int32)), None

    def tasks_right(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[bool]:
        raise NotImplementedError

    def truth(self, row: int) -> Truth:
        truth = full_truth(ORIGINAL[self.samples.ids[row]], self.samples.ids[row])
        if self.top_k is None:
            return truth
        parts = top_of(truth, self.top_k)
        return Truth(parts["top_logprobs"], parts["next_logprob"], parts["top_ids"], parts["tail_logprob"])


def random_rows(count: int = 9, seed: int = 3) -> Samples:
    random = np.random.default_rng(seed)
    ids = tuple(random.integers(0, VOCAB, random.integers(2, 60)).astype(np.int32) for _ in range(count))
    return Samples(ids, tuple("abc"[i % 3] for i in range(count)))


@pytest.fixture(scope="module")
def rows() -> Samples:
    return random_rows()


def exact_log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def by_hand(rows: Samples, wanted: str | None = None) -> dict[str, Any]:
    """The figures of a result in fp64, over all rows or those of one domain."""
    p_log, q_log = exact_log_softmax(ORIGINAL), exact_log_softmax(QUANTIZED)
    kl_of = (np.exp(p_log) * (p_log - q_log)).sum(-1)
    kl, same, ours, theirs = [], [], [], []
    for ids, domain in zip(rows.ids, rows.domains, strict=True):
        if wanted in (None, domain):
            for token, following in pairwise(ids):
                kl.append(kl_of[token])
                same.append(p_log[token].argmax() == q_log[token].argmax())
                theirs.append(p_log[token, following])
                ours.append(q_log[token, following])
    return {
        "tokens": len(kl),
        "kl_mean": np.mean(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "top1_agreement": np.mean(same),
        "ppl_reference": np.exp(-np.mean(theirs)),
        "ppl_artifact": np.exp(-np.mean(ours)),
        "ppl_ratio": np.exp(np.mean(theirs) - np.mean(ours)),
    }


def test_every_figure_is_that_of_plain_fp64_sums(rows: Samples) -> None:
    result, wanted = measure(Markov(QUANTIZED), Chain(rows), "artifact"), by_hand(rows)
    assert result["tokens"] == wanted["tokens"] == rows.tokens - len(rows.ids)
    assert {key: result[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert result["kl_is_lower_bound"] is False


def test_domains_are_measured_apart_and_add_up(rows: Samples) -> None:
    result = measure(Markov(QUANTIZED), Chain(rows), "artifact")
    assert list(result["domains"]) == ["a", "b", "c"]
    for name, found in result["domains"].items():
        wanted = by_hand(rows, name)
        figures = {key: value for key, value in found.items() if not key.endswith("_ci95")}
        assert figures == pytest.approx({key: wanted[key] for key in figures}, rel=1e-5)
        for mean, interval in (
            ("kl_mean", "kl_ci95"),
            ("top1_agreement", "top1_ci95"),
            ("ppl_ratio", "ppl_ratio_ci95"),
        ):
            assert found[interval][0] <= found[mean] <= found[interval][1]
    together = sum(domain["kl_mean"] * domain["tokens"] for domain in result["domains"].values())
    assert together / result["tokens"] == pytest.approx(result["kl_mean"])


def test_the_original_itself_has_no_drift(rows: Samples) -> None:
    result = measure(Markov(ORIGINAL), Chain(rows), "artifact")
    assert result["kl_mean"] == result["kl_p99"] == 0
    assert result["top1_agreement"] == result["ppl_ratio"] == 1
    assert result["generation"] == {
        "texts": 4,
        "agreement": 1,
        "agreement_length": 6,
        "reference_length": 6,
        "loops": result["generation"]["loops_reference"],
        "loops_reference": result["generation"]["loops_reference"],
        "extra_loops": 0,
    }


@pytest.mark.parametrize("top_k", [1, 5, 40, VOCAB, VOCAB + 10])
def test_a_partial_reference_gives_all_but_the_kl_exactly(rows: Samples, top_k: int) -> None:
    result, wanted = measure(Markov(QUANTIZED), Chain(rows, top_k), "artifact"), by_hand(rows)
    same = ["tokens", "top1_agreement", "ppl_reference", "ppl_artifact", "ppl_ratio"]
    assert {key: result[key] for key in same} == pytest.approx({key: wanted[key] for key in same}, rel=1e-5)
    assert result["kl_is_lower_bound"] is True


def test_a_partial_kl_grows_with_k_up_to_the_full_one(rows: Samples) -> None:
    full = sample_drift(Chain(rows).truth(0), QUANTIZED[rows.ids[0]], rows.ids[0]).kl
    before = np.zeros_like(full)
    for top_k in (1, 2, 5, 20, 60, VOCAB):
        partial = sample_drift(Chain(rows, top_k).truth(0), QUANTIZED[rows.ids[0]], rows.ids[0]).kl
        assert (partial >= before - 1e-6).all()
        assert (partial <= full + 1e-6).all()
        before = partial
    np.testing.assert_allclose(before, full, rtol=1e-5, atol=1e-7)


def test_a_partial_kl_is_that_of_the_k_tokens_and_the_rest_as_one(rows: Samples) -> None:
    ids, top_k = rows.ids[0], 7
    p, q = (np.exp(exact_log_softmax(t[ids[:-1]])) for t in (ORIGINAL, QUANTIZED))
    chosen = np.argsort(-p, -1)[:, :top_k]
    merged = [np.take_along_axis(d, chosen, -1) for d in (p, q)]
    merged = [np.concatenate([d, 1 - d.sum(-1, keepdims=True)], -1) for d in merged]
    wanted = (merged[0] * np.log(merged[0] / merged[1])).sum(-1)
    found = sample_drift(Chain(rows, top_k).truth(0), QUANTIZED[ids], ids).kl
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_log_softmax_is_exact_for_large_logits(scale: float) -> None:
    logits = ORIGINAL * np.float32(scale)
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True).astype(np.float64)
    wanted = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_softmax(logits), wanted, rtol=1e-6, atol=2e-7)


def test_a_small_drift_is_not_lost_in_fp32(rows: Samples) -> None:
    near = table(2, 1e-3, ORIGINAL)
    p_log, q_log = exact_log_softmax(ORIGINAL), exact_log_softmax(near)
    exact = (np.exp(p_log) * (p_log - q_log)).sum(-1)
    wanted = np.mean([exact[token] for ids in rows.ids for token in ids[:-1]])
    assert wanted < 1e-6
    assert measure(Markov(near), Chain(rows), "artifact")["kl_mean"] == pytest.approx(wanted, rel=0.1, abs=3e-8)


def test_tokens_beyond_the_references_vocabulary_are_left_out(rows: Samples) -> None:
    padded = measure(Markov(QUANTIZED, padding=31), Chain(rows, new_tokens=1), "artifact")
    plain = measure(Markov(QUANTIZED), Chain(rows, new_tokens=1), "artifact")
    assert {**padded, "generation": None} == {**plain, "generation": None}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_with_the_row(rows: Samples, value: float) -> None:
    broken = QUANTIZED.copy()
    broken[rows.ids[0][0], 5] = value
    with pytest.raises(InputError, match="artifact: its logits hold NaN or infinity on held-out sample 0"):
        measure(Markov(broken), Chain(rows), "artifact")


def test_an_artifact_that_does_not_fit_is_refused(rows: Samples) -> None:
    small = Markov(QUANTIZED)
    small.vocab_size = VOCAB - 1
    with pytest.raises(InputError, match="has 96 tokens, the reference 97: another model"):
        measure(small, Chain(rows), "artifact")
    longest = max(map(len, rows.ids))
    with pytest.raises(InputError, match=f"holds {longest - 1} positions, the reference's rows have {longest}"):
        measure(Markov(QUANTIZED, context=longest - 1), Chain(rows), "artifact")


def test_generation_is_compared_token_by_token(rows: Samples) -> None:
    reference = Chain(rows, new_tokens=40)
    result = measure(Markov(QUANTIZED), reference, "artifact")["generation"]
    ours = np.array([greedy(QUANTIZED, int(prompt[-1]), 40) for prompt in reference.continuations.prompts])
    theirs = reference.continuations.tokens
    assert result["texts"] == 4
    assert result["agreement"] == pytest.approx((ours == theirs).mean())
    assert result["loops"] == sum(map(loops, ours))
    assert result["loops_reference"] == sum(map(loops, theirs))


def test_a_loop_of_the_original_is_no_extra_loop(rows: Samples) -> None:
    constant = np.zeros((VOCAB, VOCAB), np.float32)
    constant[:, 5] = 9
    reference = Chain(rows, new_tokens=30)
    looping = sum(map(loops, reference.continuations.tokens))
    result = measure(Markov(constant), reference, "artifact")["generation"]
    assert (result["loops"], result["loops_reference"], result["extra_loops"]) == (4, looping, 4 - looping)


@pytest.mark.parametrize(
    ("text", "is_loop"),
    [
        ([1, 2, 3, 3, 3], True),
        ([1, 2, 3, 3], False),
        ([3, 3, 3, 1], False),
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([9, 1, 2, 1, 2, 1], False),
        ([1, 2, 1, 2, 1, 3], False),
        (list(range(8)) * 3, True),
        (list(range(9)) * 3, False),
        ([9, *range(8), *range(8), *range(7)], False),
        (list(range(30)), False),
        ([5], False),
        ([], False),
    ],
)
def test_a_loop_is_three_copies_of_up_to_eight_tokens_at_the_end(text: list[int], is_loop: bool) -> None:
    assert loops(np.array(text)) is is_loop


@pytest.mark.parametrize("row", range(3))
def test_the_interval_of_a_validation_holds_its_mean(row: int) -> None:
    result = measure(Markov(QUANTIZED), Chain(random_rows(12, row)), "artifact")
    low, high = result["kl_ci95"]
    assert low <= result["kl_mean"] <= high
