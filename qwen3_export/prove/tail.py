"""KL of the tail, all tokens but the k likeliest, from random draws.

m and n are the probabilities that original and artifact give to the tail, p and q their distributions inside of it:

    KL = Σ top + m log(m / n)  +  m · KL(p ‖ q)
         the proven bound         unknown to a top-k reference

A file keeps S tokens drawn from p, with their log-probabilities. As Σ q = Σ p = 1, KL(p ‖ q) is the mean over p of
r − 1 − log r, r = q / p: every term is at least 0 and of second order in the drift, so few draws are enough, the
estimate has no bias and never lies below the bound. The draws of a position are systematic: one offset, S even steps
through the tail's cumulated probability (Cochran, Sampling Techniques, 1977, chapter 8).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

# Tokens drawn per position: with 256 likeliest ones, 32 blocks of 256 positions stay below 20 MB.
TAIL_SAMPLES = 32
# A tail with less mass than this has nothing to add.
_LEAST_MASS = 1e-12


def tail_count(top_k: int, vocab: int) -> int:
    """Number of tokens drawn per position; 0 when the top k are all."""
    return TAIL_SAMPLES if 0 < top_k < vocab else 0


def draw_tail(
    logprobs: NDArray[np.float32], top_ids: NDArray[np.int32], ids: NDArray[np.int32], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Draw tokens of every position's tail by probability.

    Returns the tokens and their log-probabilities, both `[T, count]`.

    `logprobs` `[T, vocab]`, `top_ids` `[T, k]` are not drawn. The row's token `ids` seed the draws, so a row's are the
    same in every file.
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
    """KL that the tail adds to the bound `[T]`, and its sampling variance `[T]`.

    `drawn_p`, `drawn_q` `[T, S]`: both models' log-probabilities of the drawn tokens; `tail_p`, `tail_q` `[T]`: of
    the whole tail.
    """
    ratio = drawn_q.astype(np.float64) - tail_q[:, None] - (drawn_p.astype(np.float64) - tail_p[:, None])
    terms = np.expm1(ratio) - ratio
    mass = np.exp(tail_p)
    mass[mass < _LEAST_MASS] = 0.0
    count = terms.shape[1]
    return mass * terms.mean(1), mass**2 * terms.var(1, ddof=1) / count
