"""Token samples on disk, so that every tool sees the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen3_export.text.samples import Samples


def write_samples(path: Path, samples: Samples) -> None:
    """Rows of any length with their domains, as one .npz file."""
    lengths = [len(row) for row in samples.ids]
    np.savez(path, ids=np.concatenate(samples.ids), lengths=lengths, domains=json.dumps(samples.domains))


def read_samples(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """What `write_samples` wrote."""
    with np.load(path) as file:
        return np.split(file["ids"], np.cumsum(file["lengths"])[:-1]), json.loads(str(file["domains"]))


def write_matrix(path: Path, samples: Samples) -> None:
    """Calibration samples, all of one length, as the `[samples, length]` array that the peers' drivers read."""
    np.save(path, np.stack(samples.ids).astype(np.int64))
