"""A table of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReportTable:
    """A table under a title.

    The first column is text, `status` in a cell is a verdict.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
