"""KL of the tail, all tokens but the k likeliest, estimated from random draws.

Let m and n be the probability of the tail under original and artifact, p and q their distributions inside of it:

    KL = Σ top + m log(m / n)  +  m · KL(p ‖ q)
         the lower bound          unknown to a top-k reference

The reference file keeps S tokens drawn from p, with their log-probabilities. Since p and q both sum to 1, KL(p ‖ q) is
the mean over p of r − 1 − log r, with r = q / p. This estimate has no bias; it is never below the bound, since every
term is at least 0; and few draws are enough, since the terms are of second order in the drift. Draws are systematic:
one random offset, then S even steps through the tail's cumulated probability (Cochran, Sampling Techniques, 1977,
chapter 8).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

# Tokens drawn per position. Beside 256 likeliest ones, 32 rows of 256 positions stay below 20 MB.
TAIL_SAMPLES = 32
# The KL of a tail with less probability is neglected.
_LEAST_MASS = 1e-12


def tail_count(top_k: int, vocab: int) -> int:
    """Number of tokens drawn per position; 0 when no token is left to draw."""
    return TAIL_SAMPLES if 0 < top_k < vocab else 0


def draw_tail(
    logprobs: NDArray[np.float32], top_ids: NDArray[np.int32], ids: NDArray[np.int32], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Draw `count` tokens from the tail of every position, by probability.

    Returns the tokens and their log-probabilities, both `[T, count]`, from `logprobs` `[T, vocab]` without the tokens
    `top_ids` `[T, k]`. The row's token `ids` seed the draws, so that a row has the same ones in every file.
    """
    offsets = np.random.default_rng(zlib.crc32(np.ascontiguousarray(ids, np.int32).tobytes())).random(len(logprobs))
    drawn = np.empty((len(logprobs), count), np.int32)
    for position, offset in enumerate(offsets):
        rest = np.exp(logprobs[position].astype(np.float64))
        rest[top_ids[position]] = 0.0
        cumulated = np.cumsum(rest)
        steps = (np.arange(count) + offset) / count * cumulated[-1]
        drawn[position] = np.minimum(np.searchsorted(cumulated, steps, side="right"), len(rest) - 1)
    return drawn, np.take_along_axis(logprobs, drawn.astype(np.int64), 1)


def tail_divergence(
    drawn_p: NDArray[np.float32], drawn_q: NDArray[np.float32], tail_p: NDArray[np.float64], tail_q: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate of the tail's KL beyond the bound `[T]`, and its variance `[T]`.

    `drawn_p`, `drawn_q` `[T, S]` are both models' log-probabilities of the drawn tokens, `tail_p`, `tail_q` `[T]` those
    of the whole tail.
    """
    ratio = drawn_q.astype(np.float64) - tail_q[:, None] - (drawn_p.astype(np.float64) - tail_p[:, None])
    terms = np.expm1(ratio) - ratio
    mass = np.exp(tail_p)
    mass[mass < _LEAST_MASS] = 0.0
    count = terms.shape[1]
    return mass * terms.mean(1), mass**2 * terms.var(1, ddof=1) / count
