"""Calibration text that the model writes itself.

It needs no data set and has the model's own distribution of text. Half of the samples begin as a chat in which the
model also writes the user's turns (as in Magpie, Xu et al. 2024), half begin with a random ordinary token (as in
LLM-QAT, Liu et al. 2023). Tokens are drawn at temperature 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.model.decoder import Decoder
from qwen3_export.text.documents import form_of
from qwen3_export.text.samples import Samples
from qwen3_export.text.tokenizer import ModelTokenizer

_ROWS_AT_ONCE = 32
_OPENING = "<|im_start|>user\n"


def self_generated_samples(
    checkpoint: Checkpoint,
    tokenizer: ModelTokenizer,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
) -> Samples:
    """`samples` rows of `length` tokens written by the model; the seed decides them."""
    decoder = Decoder(checkpoint)
    opening = tokenizer.encode(_OPENING)
    random = np.random.default_rng(seed)
    ids: list[NDArray[np.int32]] = []
    with progress.bar("write calibration text", length * -(-samples // _ROWS_AT_ONCE)) as tick:
        for begin in range(0, samples, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, samples - begin)
            starts = random.integers(0, tokenizer.ordinary_tokens, (count, len(opening))).astype(np.int32)
            starts[::2] = opening
            ids.extend(_write(decoder, starts, length, random, tick))
    domains = tuple("self-chat" if row % 2 == 0 else "self-text" for row in range(samples))
    forms = Counter(
        form_of(tokenizer.decode(row.tolist(), skip_special=False), domain == "self-chat")
        for row, domain in zip(ids, domains, strict=True)
    )
    return Samples(tuple(ids), domains, dict(sorted(forms.items())))


@torch.no_grad()
def _write(
    decoder: Decoder, starts: NDArray[np.int32], length: int, random: np.random.Generator, tick: Callable[[], None]
) -> list[NDArray[np.int32]]:
    """Continue all rows in step, one token per pass."""
    caches = decoder.new_caches()
    text, fresh = starts, starts
    while text.shape[1] < length:
        logits = decoder.step(fresh, caches)
        fresh = _draw(logits, random)
        text = np.concatenate([text, fresh], 1)
        tick()
    return [np.ascontiguousarray(row) for row in text[:, :length]]


def _draw(logits: Tensor, random: np.random.Generator) -> NDArray[np.int32]:
    """Draw one token per row, `[rows, 1]`, by inverting the cumulative distribution."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    points = torch.from_numpy(random.random((len(logits), 1)))
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:])
    return drawn.clamp(max=logits.shape[1] - 1).numpy().astype(np.int32)
