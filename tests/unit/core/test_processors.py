"""Threads that are asked for, and those that are taken when nobody asks."""

from __future__ import annotations

import os

import pytest

from qwen3_export.core.processors import MOST_THREADS, thread_count
from qwen3_export.errors import InputError


def test_affinity_decides() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert thread_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_number_that_is_asked_for() -> None:
    assert thread_count(7) == 7
    for asked in (0, -1, MOST_THREADS + 1, 10**400):
        with pytest.raises(InputError, match="--threads"):
            thread_count(asked)
