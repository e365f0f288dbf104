"""What a search measures, and on which samples, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.table import Table
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.activations import SampleFile, write_embeddings
from qwen3_export.solve.chunk_sizes import samples_at_once
from qwen3_export.solve.mixed_precision.units import Unit


@dataclass(frozen=True)
class Study:
    """A measurement of units: `schemes` has the candidates of each, the probe first.

    `calibration` are token ids of the samples to solve with, `held_out` of those to measure on.
    """

    checkpoint: Checkpoint
    method: ModuleType
    options: Any
    schemes: Mapping[Unit, Sequence[QuantScheme]]
    calibration: Sequence[NDArray]
    held_out: Sequence[NDArray]
    pool: Workers
    scratch: Path


@dataclass(frozen=True)
class Variant:
    """The model with only one unit quantized: its errors, hidden states, and perhaps head."""

    unit: Unit
    probe: QuantScheme
    errors: Mapping[QuantScheme, float]
    hidden: SampleFile
    head: Table | None = None


def hidden_file(study: Study, name: str, tokens: int, stack: ExitStack) -> SampleFile:
    """Hidden states `[1, tokens, hidden]` per sample, in a file that `stack` closes."""
    file = SampleFile(study.scratch / f"{name}.samples", (1, tokens, study.checkpoint.config.hidden_size))
    stack.callback(file.close)
    return file


def embed_file(
    study: Study, name: str, samples: Sequence[NDArray], stack: ExitStack, table: Table | None = None
) -> SampleFile:
    """Embeddings of some token samples of one length; `table` None is the original's."""
    table = table or Table(study.checkpoint.read(f"{EMBEDDING}.weight"))
    file = hidden_file(study, name, len(samples[0]), stack)
    write_embeddings(file, table, samples, study.pool)
    return file


def at_once(study: Study) -> int:
    """Calibration samples whose inputs are in memory together."""
    return samples_at_once(len(study.calibration[0]))
