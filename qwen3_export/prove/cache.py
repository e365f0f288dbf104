"""Scales of a quantized key/value cache, and the drift that its codes cause.

Scales are chosen from the keys and values that calibration samples leave in an unquantized cache. Both channels of a
rotated pair of keys share a scale, taken from the pair's length, since RoPE rotates one into the other as the position
changes but keeps the length. Values have one scale per channel, taken from the largest magnitude. Of several shares of
that largest value, the one with the least squared rounding error is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.finite import all_finite
from qwen3_export.errors import InputError
from qwen3_export.prove.divergence import divergences
from qwen3_export.run.parted import PartedModel
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer

_SAMPLES, _LENGTH = 24, 128
# Candidates for the value of the largest code, as shares of the largest calibration value. With 8 bits shares above 1
# leave room for larger values, which halves the KL on held-out text (8 samples: 0.9e-4 in place of 1.8e-4).
_SHARES = {8: (1.1,), 4: tuple(np.arange(0.5, 1.01, 0.05))}
_SMALLEST = np.float32(1e-6)
_WHERE = "calibrating the cache"

Scales = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def cache_scales(folder: Path, bits: int, threads: int | None = None) -> Scales:
    """Scales of every layer's keys and values, fp32 `[kv_heads, 1, head_dim]`."""
    model, scales = PartedModel(folder, threads), {}
    for caches in model.caches(model.stream([[ids] for ids in _samples(folder, model)])):
        for name, parts in caches.items():
            values = np.concatenate(parts, 1)
            if not all_finite(values):
                raise InputError(f"{_WHERE}: {name} holds NaN or infinity", "its weights are damaged")
            scales[name] = (_key_scale if name.endswith(".key") else _scale)(values, bits)
    names = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(len(scales) // 2)]
    return [(scales[key], scales[value]) for key, value in names]


def _samples(folder: Path, model: PartedModel) -> tuple[NDArray[np.int32], ...]:
    length = min(_LENGTH, model.context)
    return calibration_samples(ModelTokenizer(folder), load_documents("bundled"), _SAMPLES, length, seed=0).ids


def _key_scale(keys: NDArray, bits: int) -> NDArray[np.float32]:
    """Scales of keys `[kv_heads, tokens, head_dim]`, equal in both channels of a pair."""
    first, second = np.split(keys, 2, axis=-1)
    scale = _scale(np.hypot(first, second), bits)
    return np.concatenate([scale, scale], -1)


def _scale(values: NDArray, bits: int) -> NDArray[np.float32]:
    """The scale of least error for each channel of `[kv_heads, tokens, channels]`."""
    most = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(values).max(1, keepdims=True), _SMALLEST).astype(np.float32)
    tried = [np.float32(share) * largest / np.float32(most) for share in _SHARES[bits]]
    rounded = [np.clip(np.rint(values / scale), -most - 1, most) * scale for scale in tried]
    errors = [np.square(r - values).sum(1, keepdims=True) for r in rounded]
    best = np.argmin(np.stack(errors), 0)
    return np.take_along_axis(np.stack(tried), best[None], 0)[0]


def cache_cost(plain: Path, quantized: Path, threads: int | None = None) -> dict[str, Any]:
    """What the cache's codes add to the drift.

    `{kv_cache_kl, kv_cache_tokens}`, in nats per token. It is KL(exact ‖ quantized) − KL(exact ‖ plain), so that the
    accuracy level's cost and the cache's together are that of the folder. KL(plain ‖ quantized) would be larger at
    level 4: a small change of an input moves its 8-bit code, and that counts although neither code is nearer to the
    truth. Half of the tokens are decoded one by one.
    """
    first, second = PartedModel(plain, threads), PartedModel(quantized, threads)
    calls = [_calls(ids) for ids in _samples(plain, first)[::3]]
    before = first.logits(first.stream(calls, exact=True), first.stream(calls))
    after = (sequences for [sequences] in second.logits(second.stream(calls)))
    pieces = ((exact, (runs, coded)) for (exact, runs), coded in zip(before, after, strict=True))
    without, beside = divergences(pieces)
    added = max(float((beside - without).mean()), 0.0)
    return {"kv_cache_kl": float(f"{added:.2g}"), "kv_cache_tokens": len(beside)}


def _calls(ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """A prompt, and the tokens after it."""
    half = len(ids) // 2
    return [ids[:half], *ids[half:, None]]
