"""Drift: how far an artifact's distributions are from the original's.

    KL(original ‖ artifact) = Σ p (log p − log q)      nats per token
    top-1 agreement         = share of positions with the same most likely token
    perplexity              = exp(−mean log-probability of the text's next token)

A top-k reference lumps all other tokens together, which makes KL a lower bound (the data-processing inequality). Where
it also holds tokens drawn from the others, they give an estimate without bias (`prove.tail`), with the bound beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.progress import Progress
from qwen3_export.errors import InputError
from qwen3_export.prove.generation import MODES, chat_generation, generation
from qwen3_export.prove.reference import Reference, Truth, log_softmax
from qwen3_export.prove.statistics import SampleDrift, histogram, intervals, row_sums, statistics
from qwen3_export.prove.tail import tail_divergence
from qwen3_export.run.session import Session

# The original counts as sure of a token from this probability on.
SURE = 0.9


def sample_drift(truth: Truth, logits: NDArray[np.float32], ids: NDArray[np.int32]) -> SampleDrift:
    """Drift of one row from the artifact's logits `[len(ids), vocab]`.

    The last position has no next token, so it is not scored.
    """
    q = log_softmax(logits[:-1])
    following = ids[1:, None].astype(np.int64)
    top = q.argmax(-1)
    bound, variance = None, None
    if truth.ids is None:
        kl = (np.exp(truth.logprobs) * (truth.logprobs - q)).sum(-1, dtype=np.float64)
        same = truth.logprobs.argmax(-1) == top
    else:
        kl, bound, variance = _partial_kl(truth, q)
        same = truth.ids[:, 0] == top
    artifact = np.take_along_axis(q, following, 1)[:, 0].astype(np.float64)
    sure = truth.logprobs.max(-1) >= np.log(SURE)
    return SampleDrift(kl, same, truth.next_logprob.astype(np.float64), artifact, sure, bound, variance)


def _partial_kl(
    truth: Truth, q: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """KL of every position; where it is an estimate, also its bound and variance."""
    assert truth.ids is not None
    assert truth.tail is not None
    q_top = np.take_along_axis(q, truth.ids.astype(np.int64), 1)
    inside = (np.exp(truth.logprobs) * (truth.logprobs - q_top)).sum(-1, dtype=np.float64)
    rest = np.exp(q.astype(np.float64))
    np.put_along_axis(rest, truth.ids.astype(np.int64), 0.0, 1)
    q_tail = np.log(np.maximum(rest.sum(-1), 1e-30))
    tail = truth.tail.astype(np.float64)
    bound = inside + np.exp(tail) * (tail - q_tail)
    if truth.drawn_ids is None or truth.drawn_logprobs is None:
        return bound, None, None
    q_drawn = np.take_along_axis(q, truth.drawn_ids.astype(np.int64), 1)
    more, variance = tail_divergence(truth.drawn_logprobs, q_drawn, tail, q_tail)
    return bound + more, bound, variance


def measure(session: Session, reference: Reference, label: str, progress: Progress | None = None) -> dict[str, Any]:
    """Run every held-out sample through the artifact and measure its drift.

    Returns the drift fields of a `validate` result. Raises InputError when the artifact's vocabulary or context does
    not fit the reference.
    """
    _check_fit(session, reference, label)
    samples, drifts = reference.samples, []
    with (progress or Progress()).bar(f"validate {label}", len(samples.ids)) as tick:
        for row, ids in enumerate(samples.ids):
            logits = session.prefill(ids)[:, : reference.vocab_size]
            if not np.isfinite(logits).all():
                raise InputError(f"{label}: its logits hold NaN or infinity on held-out sample {row}")
            drifts.append(sample_drift(reference.truth(row), logits, ids))
            tick()
    result = {**_summary(drifts), "kl_is_lower_bound": reference.is_lower_bound, "kl_estimate": _estimate(drifts)}
    result["domains"] = {
        domain: _domain([d for d, found in zip(drifts, samples.domains, strict=True) if found == domain])
        for domain in sorted(set(samples.domains))
    }
    result["statistics"] = statistics(drifts)
    result["kl_histogram"] = histogram(drifts)
    result["rows"] = row_sums(drifts, samples.domains)
    result["flips"] = flips(drifts)
    result["generation"] = _generation(session, reference, label, progress or Progress())
    return result


def _generation(session: Session, reference: Reference, label: str, progress: Progress) -> dict[str, Any]:
    """Greedy texts compared: plain ones, and chats where the reference has them."""
    chats = reference.chats
    count = len(reference.continuations.prompts) + sum(len(chats.prompts[mode]) for mode in MODES if chats)
    with progress.bar(f"texts of {label}", count) as tick:
        plain = generation(session, reference.continuations, tick)
        return {**plain, **(chat_generation(session, chats, tick) if chats else {})}


def _estimate(drifts: Sequence[SampleDrift]) -> dict[str, float] | None:
    """Bound and standard error of an estimated KL, None for any other.

    `stderr` is the error from drawing tokens, not from choosing the text.
    """
    bounds = [d.kl_bound for d in drifts if d.kl_bound is not None]
    variances = [d.kl_variance for d in drifts if d.kl_variance is not None]
    if len(bounds) < len(drifts):
        return None
    total = np.concatenate(variances).sum()
    positions = sum(map(len, bounds))
    return {"lower_bound": float(np.concatenate(bounds).mean()), "stderr": float(np.sqrt(total) / positions)}


def flips(drifts: Sequence[SampleDrift]) -> dict[str, Any]:
    """How often the artifact prefers another token where the original is sure."""
    sure = np.concatenate([d.sure for d in drifts])
    other = sure & ~np.concatenate([d.same_top for d in drifts])
    count = int(sure.sum())
    return {
        "sure_from": SURE,
        "sure_positions": count,
        "flips": int(other.sum()),
        "share": float(other.sum() / count) if count else None,
    }


def _check_fit(session: Session, reference: Reference, label: str) -> None:
    if session.vocab_size < reference.vocab_size:
        raise InputError(
            f"{label} has {session.vocab_size} tokens, the reference {reference.vocab_size}: another model?"
        )
    longest = max(len(ids) for ids in reference.samples.ids)
    if session.context < longest:
        raise InputError(f"{label} holds {session.context} positions, the reference's rows have {longest}")


def _summary(drifts: Sequence[SampleDrift]) -> dict[str, Any]:
    kl = np.concatenate([d.kl for d in drifts])
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        **_common(drifts),
        **intervals(drifts),
    }


def _common(drifts: Sequence[SampleDrift]) -> dict[str, float]:
    reference = float(np.exp(-np.concatenate([d.reference_logprob for d in drifts]).mean()))
    artifact = float(np.exp(-np.concatenate([d.artifact_logprob for d in drifts]).mean()))
    return {
        "top1_agreement": float(np.concatenate([d.same_top for d in drifts]).mean()),
        "ppl_reference": reference,
        "ppl_artifact": artifact,
        "ppl_ratio": artifact / reference,
    }


def _domain(drifts: Sequence[SampleDrift]) -> dict[str, Any]:
    kl = np.concatenate([d.kl for d in drifts])
    return {"tokens": len(kl), "kl_mean": float(kl.mean()), **_common(drifts), **intervals(drifts)}
