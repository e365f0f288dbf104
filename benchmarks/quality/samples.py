"""Token samples on disk, so that every tool sees the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen3_export.text.samples import Samples


def write_samples(path: Path, samples: Samples) -> None:
    """Write rows of any length with their domains as an .npz file."""
    lengths = [len(row) for row in samples.ids]
    np.savez(path, ids=np.concatenate(samples.ids), lengths=lengths, domains=json.dumps(samples.domains))


def read_samples(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """What `write_samples` wrote."""
    with np.load(path) as file:
        return np.split(file["ids"], np.cumsum(file["lengths"])[:-1]), json.loads(str(file["domains"]))


def write_matrix(path: Path, samples: Samples) -> None:
    """Write calibration samples as a `[samples, length]` array for the peers' drivers."""
    np.save(path, np.stack(samples.ids).astype(np.int64))
