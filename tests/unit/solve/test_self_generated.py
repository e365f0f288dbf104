"""Calibration text that the model writes: decided by the seed, and drawn from the model's own distribution."""

from __future__ import annotations

import numpy as np
import torch

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.model.decoder import Decoder
from qwen3_export.solve.calibration.self_generated import self_generated_samples
from qwen3_export.text.tokenizer import ModelTokenizer


def test_the_seed_decides_the_text(reference_model: Checkpoint) -> None:
    tokenizer = ModelTokenizer(reference_model.folder)
    first, again, other = (
        self_generated_samples(reference_model, tokenizer, 3, 24, seed, Progress()) for seed in (1, 1, 2)
    )
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert [len(row) for row in first.ids] == [24, 24, 24]
    assert first.domains == ("self-chat", "self-text", "self-chat")
    assert tokenizer.decode(first.ids[0], skip_special=False).startswith("<|im_start|>user\n")


def test_rows_written_in_step_have_the_logits_of_each_row_alone(reference_model: Checkpoint) -> None:
    decoder = Decoder(reference_model)
    ids = np.random.default_rng(0).integers(0, 8000, (3, 9)).astype(np.int32)
    caches = decoder.new_caches()
    decoder.step(ids[:, :5], caches)
    together = decoder.step(ids[:, 5:], caches)
    for row in range(3):
        alone = decoder.logits(decoder.hidden([ids[row]])[0][-1:])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)
