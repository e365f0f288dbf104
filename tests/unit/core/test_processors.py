"""Threads that are asked for, and those that are taken when nobody asks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen3_export.core.processors import MOST_THREADS, sums_int8_exactly, thread_count
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


def test_who_sums_int8_products_exactly(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    for flags, exact in (("sse2 avx2", False), ("avx2 avx_vnni", True), ("avx2 avx512_vnni sha_ni", True)):
        path.write_text(f"processor\t: 0\nmodel name\t: made up\nflags\t\t: fpu {flags}\n")
        assert sums_int8_exactly(path, "x86_64") is exact
    assert not sums_int8_exactly(tmp_path / "absent", "AMD64")
    assert sums_int8_exactly(tmp_path / "absent", "aarch64")
