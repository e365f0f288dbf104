"""Token rows on disk, so that every tool sees the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen3_export.text.rows import Rows


def write_rows(path: Path, rows: Rows) -> None:
    """Rows of any length with their domains, as one .npz file."""
    lengths = [len(row) for row in rows.ids]
    np.savez(path, ids=np.concatenate(rows.ids), lengths=lengths, domains=json.dumps(rows.domains))


def read_rows(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """What `write_rows` wrote."""
    with np.load(path) as file:
        return np.split(file["ids"], np.cumsum(file["lengths"])[:-1]), json.loads(str(file["domains"]))


def write_matrix(path: Path, rows: Rows) -> None:
    """Calibration rows, all of one length, as the `[rows, length]` array that the peers' drivers read."""
    np.save(path, np.stack(rows.ids).astype(np.int64))
