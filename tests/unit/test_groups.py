"""Tests of one group run in one process, so that what they install or start is made once."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("alone")
def test_groups_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes a group behind a test's name; with pytest 9.2 and xdist 3.8 the name stays as it was."""
    if "PYTEST_XDIST_WORKER" in os.environ and request.config.option.loadgroup:
        assert request.node.nodeid.endswith("@alone")
