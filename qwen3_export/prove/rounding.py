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

from qwen3_export.core.files import read_object
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.errors import ExportError
from qwen3_export.prove.divergence import divergence
from qwen3_export.run.parted import PartedModel
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel

# Of several domains. Other samples as many move the result by 10 to 18 %; twice as many tokens cost as long as packing
# the weights, and are moved by 5 to 11 %. Few tokens of a mixture's, for which rounding has a router choose another
# expert, decide its result: it moves by a quarter.
_SAMPLES, _SPARSE_SAMPLES, _LENGTH = 4, 16, 8
# Samples joined to one row, where the context is long enough: behind few tokens the rounding costs a little less.
_JOINED = 4
# Of how many documents one is read: enough to choose samples from.
_DOCUMENTS_EVERY = 8


def level_cost(folder: Path, threads: int | None = None) -> dict[str, Any]:
    """`{added_kl, added_kl_tokens}` in nats per token.

    Where it cannot be measured, `added_kl` is None and `added_kl_reason` says why.
    """
    try:
        kl, tokens = _added_kl(folder, threads)
    except ExportError as error:
        return {"added_kl": None, "added_kl_tokens": 0, "added_kl_reason": str(error).removeprefix(f"{folder}: ")}
    return {"added_kl": float(f"{kl:.2g}"), "added_kl_tokens": tokens}


def _added_kl(folder: Path, threads: int | None) -> tuple[float, int]:
    model = PartedModel(folder, threads)
    config = folder / "config.json"
    samples = _SPARSE_SAMPLES if parse_config(read_object(config), str(config)).sparse_layers else _SAMPLES
    prompts = [[_prompts(ModelTokenizer(folder), model.context, samples)]]
    pieces = model.logits(model.stream(prompts, exact=True), model.stream(prompts))
    per_token = divergence((exact, rounded) for exact, rounded in pieces)
    return max(float(per_token.mean()), 0.0), len(per_token)


def _prompts(tokenizer: TextModel, context: int, samples: int) -> NDArray[np.int32]:
    """Token ids `[rows, tokens]`, one batch, since every call reads all weights."""
    documents, length = load_documents("bundled")[::_DOCUMENTS_EVERY], min(_LENGTH, context)
    ids = calibration_samples(tokenizer, documents, samples, length, seed=0).ids
    return np.concatenate(ids).reshape(-1, length * (_JOINED if context >= _JOINED * length else 1))
