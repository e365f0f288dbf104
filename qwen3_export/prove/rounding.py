"""What rounded activations cost an ONNX folder.

It is KL(exact ‖ as it runs) on calibration samples.

exact        the folder's own codes, activations as they are        accuracy level 0
as it runs   activations rounded to int8 in blocks                  accuracy level 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen3_export.errors import ExportError
from qwen3_export.prove.reference import log_softmax
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples

_SAMPLES, _LENGTH = 8, 32


def level_cost(folder: Path) -> dict[str, Any]:
    """`{added_kl, added_kl_tokens}` in nats per token; where it cannot be measured, None and `added_kl_reason`."""
    try:
        kl, tokens = _added_kl(folder)
    except ExportError as error:
        return {"added_kl": None, "added_kl_tokens": 0, "added_kl_reason": str(error).replace(str(folder), "it")}
    return {"added_kl": float(f"{kl:.2g}"), "added_kl_tokens": tokens}


def _added_kl(folder: Path) -> tuple[float, int]:
    exact = open_session(folder, RuntimeOptions(exact=True))
    try:
        rows = calibration_samples(
            tokenizer_of(folder, exact), load_documents("bundled"), _SAMPLES, _LENGTH, seed=0
        ).ids
        truth = [exact.prefill(ids) for ids in rows]
    finally:
        exact.close()
    rounded = open_session(folder)
    try:
        pairs = [(log_softmax(p), log_softmax(rounded.prefill(ids))) for p, ids in zip(truth, rows, strict=True)]
    finally:
        rounded.close()
    per_token = np.concatenate([(np.exp(p) * (p - q)).sum(-1, dtype=np.float64) for p, q in pairs])
    return max(float(per_token.mean()), 0.0), len(per_token)
