"""Fixtures that all tests of the solve share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen3_export.model.workers import Workers, workers


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    """Two threads, as `quantize --threads 2` has them."""
    with workers(2) as found:
        yield found
