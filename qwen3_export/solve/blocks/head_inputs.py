"""Inputs of the output head: normed hidden states after the last block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import FINAL_NORM
from qwen3_export.model.block import rms_norm
from qwen3_export.model.table import to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.activations import SampleFile
from qwen3_export.solve.calibration.collect import collect_moments
from qwen3_export.solve.calibration.moments import Moments, SampleInputs
from qwen3_export.solve.chunk_sizes import samples_at_once


def head_moments(
    checkpoint: Checkpoint, files: Sequence[SampleFile], samples: Sequence[int], length: int, pool: Workers,
    device: str, norm: Tensor | None = None,
) -> Moments:  # fmt: skip
    """Moments of the head's inputs: hidden states after the last block and the norm.

    `files` have the hidden states before the norm, `[1, length, hidden]` per sample. `norm` `[hidden]` is by default
    the checkpoint's own.
    """
    config = checkpoint.config
    norm = final_norm(checkpoint, device) if norm is None else norm
    sample = partial(head_sample, files, {}, norm, config.rms_norm_eps, device)
    return collect_moments(sample, samples, samples_at_once(length), config.hidden_size, device, pool)


def final_norm(checkpoint: Checkpoint, device: str) -> Tensor:
    """The final norm's weight `[hidden]` in fp32."""
    return to_torch(checkpoint.read(FINAL_NORM)).float().to(device)


def head_sample(
    files: Sequence[SampleFile], places: Mapping[int, int], norm: Tensor, eps: float, device: str, sample: int
) -> SampleInputs:
    """One sample's inputs of the head, and their drift where the original runs beside.

    `places` are the original's samples by number.
    """
    at = (sample, places.get(sample, sample))
    x, *original = (rms_norm(file.read(place)[0].to(device), norm, eps) for file, place in zip(files, at, strict=False))
    return SampleInputs(x, original[0] - x) if original else SampleInputs(x)
