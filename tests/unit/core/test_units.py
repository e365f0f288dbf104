"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from qwen3_export.core.units import binary_size, parse_size


@pytest.mark.parametrize(
    ("count", "up", "down"),
    [
        (0, "0 B", "0 B"),
        (1023, "1023 B", "1023 B"),
        (2**20, "1 MiB", "1 MiB"),
        (500 * 2**20, "500 MiB", "500 MiB"),
        (500 * 2**20 + 1, "500.1 MiB", "500 MiB"),
        (1.234 * 2**30, "1.24 GiB", "1.23 GiB"),
        (10_000 * 2**30, "10000 GiB", "10000 GiB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_fits(count: float, up: str, down: str) -> None:
    assert (binary_size(count), binary_size(count, up=False)) == (up, down)


@pytest.mark.parametrize("count", [1, 1025, 123_456_789, 2**30 - 1, 5 * 2**30 + 1])
def test_what_is_told_to_be_needed_is_enough_when_it_is_given(count: int) -> None:
    given = parse_size(binary_size(count))
    assert given is not None
    assert count <= given <= 1.1 * count + 1024
