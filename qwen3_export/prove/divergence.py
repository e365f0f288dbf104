"""KL of two sets of logits that come in pieces of the vocabulary.

No whole row is ever held.

With a and b the logits of one position, p = softmax(a) and q = softmax(b):

    KL(p ‖ q) = Σ p·(a − b) − log Σ exp(a) + log Σ exp(b)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# Logits of as many positions are compared at once.
_POSITIONS = 16
# A piece's logits of each sequence, `[positions, words]`.
Logits = Sequence[NDArray[np.float32]]


def divergence(pieces: Iterable[tuple[Logits, Logits]]) -> NDArray[np.float64]:
    """KL(truth ‖ found) in nats of each position, sequence after sequence."""
    return divergences((truth, [found]) for truth, found in pieces)[0]


def divergences(pieces: Iterable[tuple[Logits, Sequence[Logits]]]) -> list[NDArray[np.float64]]:
    """As `divergence`, for several that were found beside one truth."""
    sums: list[list[_Sums]] = []
    for truth, several in pieces:
        sums = sums or [[_Sums(len(logits)) for logits in truth] for _ in several]
        for own, found in zip(sums, several, strict=True):
            for one, a, b in zip(own, truth, found, strict=True):
                one.add(a, b)
    return [np.concatenate([one.divergence() for one in own]) for own in sums]


class _Sums:
    """The sums so far: Σ exp(a), Σ exp(b) and Σ exp(a)·(a − b).

    Each is divided by the exponential of its largest logit.
    """

    def __init__(self, positions: int) -> None:
        self._top = np.full((2, positions), -np.inf, np.float32)
        self._total, self._weighed = np.zeros((2, positions)), np.zeros(positions)

    def add(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
        """Another piece of the vocabulary."""
        for begin in range(0, len(a), _POSITIONS):
            rows = slice(begin, begin + _POSITIONS)
            self._add(rows, a[rows], b[rows])

    def _add(self, rows: slice, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
        top = np.maximum(self._top[:, rows], [a.max(-1), b.max(-1)])
        shrunk = np.exp(self._top[:, rows] - top, dtype=np.float64)
        p, q = (np.exp(logits - largest[:, None]) for logits, largest in zip((a, b), top, strict=True))
        sums = [p.sum(-1, dtype=np.float64), q.sum(-1, dtype=np.float64)]
        self._total[:, rows] = self._total[:, rows] * shrunk + sums
        self._weighed[rows] = self._weighed[rows] * shrunk[0] + (p * (a - b)).sum(-1, dtype=np.float64)
        self._top[:, rows] = top

    def divergence(self) -> NDArray[np.float64]:
        """KL of each position."""
        of_truth, of_found = self._top + np.log(self._total)
        found: NDArray[np.float64] = self._weighed / self._total[0] - of_truth + of_found
        return found
