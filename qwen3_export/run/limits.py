"""Limits of sampling, for the command `run` and for requests to a server alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingLimit:
    """The type of an option, its least and its greatest value."""

    kind: type[int] | type[float]
    least: float
    most: float


# By the names of `run.generate.Sampling`. With top_p 0 the most likely token is taken.
MAX_NEW_TOKENS = SamplingLimit(int, 1, 1 << 20)
TEMPERATURE = SamplingLimit(float, 0, 1000)
TOP_P = SamplingLimit(float, 0, 1)
SEED = SamplingLimit(int, 0, (1 << 63) - 1)
