"""One checkpoint folder, run by transformers and by us, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.model.decoder import Decoder

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# Tolerance relative to the largest logit, for fp32 sums in another order.
TOLERANCE = 2e-5


def load_theirs(folder: Path, **options: Any) -> Any:
    """transformers' model, its weights converted to fp32 as they are loaded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    for parameter in model.parameters():
        # Experts are unpacked in the scales' bf16, whatever dtype was asked for.
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return model.eval()


@torch.no_grad()
def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits `[tokens, vocab]` of one row."""
    return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def our_logits(folder: Path, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits `[tokens, vocab]` of each row."""
    decoder = Decoder(open_checkpoint(folder))
    return [decoder.logits(hidden).numpy() for hidden in decoder.hidden(rows)]


def random_rows(vocab: int, lengths: Sequence[int] = (1, 7, 50), seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, length).astype(np.int32) for length in lengths]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def assert_same_logits(ours: Path, theirs: Path, tolerance: float = TOLERANCE, **options: Any) -> None:
    """Assert that our logits of one folder are transformers' logits of another."""
    model = load_theirs(theirs, **options)
    rows = random_rows(model.config.vocab_size)
    for ids, found in zip(rows, our_logits(ours, rows), strict=True):
        assert relative_error(found, their_logits(model, ids)) <= tolerance


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """`{module name: weight in fp32}` of every quantized linear of one of our folders."""
    checkpoint = open_checkpoint(folder)
    found = {}
    for module in checkpoint.schemes:
        tensor = checkpoint.linear(module)
        assert isinstance(tensor, QuantizedTensor)
        found[module] = dequantize(tensor)
    return found
