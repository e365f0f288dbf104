"""Attention in bf16 and fp32 against softmax(q kᵀ / √d + mask) v in fp64, from the same bf16 numbers."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3_export.model.attention import QUERIES, causal_attention

LENGTHS = (1, 2, 127, 128, 129, 300)
HEADS = [(4, 4), (4, 2), (8, 1)]


def inputs(batch: int, heads: tuple[int, int], tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, tokens, 32) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In fp64, every head with keys and values of its own."""
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(m.double().repeat_interleave(shared, 1) for m in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_the_softmax_in_fp64(batch: int, heads: tuple[int, int]) -> None:
    assert any(tokens > 2 * QUERIES and tokens % QUERIES for tokens in LENGTHS)
    for tokens in LENGTHS:
        q, k, v = inputs(batch, heads, tokens)
        found, wanted = causal_attention(q, k, v), exact(q, k, v)
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        error = (found.double() - wanted).abs()
        exactly = causal_attention(q.float(), k.float(), v.float())
        torch.testing.assert_close(exactly.double(), wanted, rtol=1e-5, atol=1e-5)
        # Scores, shares and what comes out are rounded to 8 bits each, of numbers up to the largest value.
        assert error.max() < 2.0**-7 * float(v.abs().max())
        assert error.mean() < 2.0**-9


@pytest.mark.parametrize("place", [0, 127, 128, 200])
def test_no_token_sees_a_later_one(place: int) -> None:
    q, k, v = inputs(1, (4, 2), 300)
    changed = [m.clone() for m in (k, v)]
    for m in changed:
        m[:, :, place + 1 :] = 100.0
    before, after = causal_attention(q, k, v), causal_attention(q, *changed)
    assert torch.equal(before[:, :, : place + 1], after[:, :, : place + 1])
    assert not torch.equal(before[:, :, place + 1 :], after[:, :, place + 1 :])


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    q, k, v = inputs(2, (4, 2), 140)
    alone = [causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(causal_attention(q, k, v), torch.cat(alone), rtol=0, atol=4 * 2.0**-8)
