"""The part of an ONNX folder's drift that rounded activations cause.

It is KL(exact ‖ as it runs) on calibration samples.

exact        the folder's own codes, activations as they are        accuracy level 0
as it runs   activations rounded to int8 in blocks                  accuracy level 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.errors import ExportError
from qwen3_export.prove.reference import log_softmax
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import TextModel

_SAMPLES, _LENGTH = 8, 16
# Samples joined into one prompt, since every prompt reads all weights; logits compared at once.
_TOGETHER, _POSITIONS = 4, 16


def level_cost(folder: Path) -> dict[str, Any]:
    """`{added_kl, added_kl_tokens}` in nats per token.

    Where it cannot be measured, `added_kl` is None and `added_kl_reason` says why.
    """
    try:
        kl, tokens = _added_kl(folder)
    except ExportError as error:
        return {"added_kl": None, "added_kl_tokens": 0, "added_kl_reason": str(error).replace(str(folder), "it")}
    return {"added_kl": float(f"{kl:.2g}"), "added_kl_tokens": tokens}


def _added_kl(folder: Path) -> tuple[float, int]:
    # The rounded one runs first, while no logits are held, since it takes more memory.
    rounded = open_session(folder)
    try:
        prompts = _prompts(tokenizer_of(folder, rounded), rounded.context)
        found = [rounded.prefill(ids) for ids in prompts]
    finally:
        rounded.close()
    exact = open_session(folder, RuntimeOptions(exact=True))
    try:
        per_token = [_divergence(exact.prefill(ids), q) for ids, q in zip(prompts, found, strict=True)]
    finally:
        exact.close()
    return max(float(np.concatenate(per_token).mean()), 0.0), sum(map(len, per_token))


def _prompts(tokenizer: TextModel, context: int) -> list[NDArray[np.int32]]:
    rows = calibration_samples(tokenizer, load_documents("bundled"), _SAMPLES, _LENGTH, seed=0).ids
    together = max(1, min(_TOGETHER, context // _LENGTH))
    return [np.concatenate(rows[begin : begin + together]) for begin in range(0, len(rows), together)]


def _divergence(truth: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(truth ‖ found) of each position, from logits `[positions, vocab]`."""
    parts = []
    for begin in range(0, len(truth), _POSITIONS):
        p, q = (log_softmax(logits[begin : begin + _POSITIONS]) for logits in (truth, found))
        parts.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64))
    return np.concatenate(parts)
