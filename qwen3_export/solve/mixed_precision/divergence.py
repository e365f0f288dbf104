"""Mean KL divergence of changed models from the original, over some samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.model.block import rms_norm
from qwen3_export.model.table import Table, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.activations import SampleFile

_POSITIONS_AT_ONCE = 64


def mean_divergences(
    checkpoint: Checkpoint,
    original: SampleFile,
    changed: Sequence[tuple[SampleFile, Table | None]],
    shape: tuple[int, int],
    pool: Workers,
    tick: Callable[[], object] = lambda: None,
) -> list[float]:
    """KL(original ‖ changed) of each, nats per token.

    `changed` are files of hidden states after the last block, `[1, tokens, hidden]` per sample, each with its head, or
    None for the original's head. `shape` is the number of samples and of tokens in each. `tick` is called once per
    sample.
    """
    norm = to_torch(checkpoint.read("model.norm.weight")).float()
    own = Table(checkpoint.read(checkpoint.head))
    count, length = shape
    pieces = [slice(i, min(i + _POSITIONS_AT_ONCE, length)) for i in range(0, length, _POSITIONS_AT_ONCE)]

    def log_probabilities(file: SampleFile, head: Table, sample: int, piece: slice) -> Tensor:
        hidden = rms_norm(file.read(sample)[0, piece], norm, checkpoint.config.rms_norm_eps)
        return head.logits(hidden).log_softmax(-1)

    def one_sample(sample: int) -> list[float]:
        total = np.zeros(len(changed))
        for piece in pieces:
            expected = log_probabilities(original, own, sample, piece)
            chances = expected.exp()
            for number, (file, head) in enumerate(changed):
                found = log_probabilities(file, head or own, sample, piece)
                total[number] += float((chances * (expected - found)).double().sum())
        tick()
        return total.tolist()

    sums = np.sum(pool.share_map("divergence", one_sample, range(count)), axis=0)
    return [max(float(value), 0.0) / (count * length) for value in sums]
