"""The part of an ONNX folder's drift that rounded activations cause.

It is KL(exact ‖ as it runs) on calibration samples.

exact        the folder's own codes, activations as they are        accuracy level 0
as it runs   activations rounded to int8 in blocks                  accuracy level 4

The model is run part by part (`run.parted`), so memory grows with the width of a block, not with the number of blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.errors import ExportError
from qwen3_export.prove.divergence import divergence
from qwen3_export.run.parted import PartedModel
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel

_SAMPLES, _LENGTH = 8, 16
# Samples joined into one prompt, since every prompt reads all weights.
_TOGETHER = 4


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
    model = PartedModel(folder)
    prompts = [[ids] for ids in _prompts(ModelTokenizer(folder), model.context)]
    pieces = model.logits(model.stream(prompts, exact=True), model.stream(prompts))
    per_token = divergence((exact, rounded) for exact, rounded in pieces)
    return max(float(per_token.mean()), 0.0), len(per_token)


def _prompts(tokenizer: TextModel, context: int) -> list[NDArray[np.int32]]:
    rows = calibration_samples(tokenizer, load_documents("bundled"), _SAMPLES, _LENGTH, seed=0).ids
    together = max(1, min(_TOGETHER, context // _LENGTH))
    return [np.concatenate(rows[begin : begin + together]) for begin in range(0, len(rows), together)]
