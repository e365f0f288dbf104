"""A table of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReportTable:
    """A table with a title; the first column names its rows."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
