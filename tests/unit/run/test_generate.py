"""Choosing the next token: the most likely one, or draws whose frequencies are the nucleus' own; text as it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.run import generate
from qwen3_export.run.generate import Sampling, chat, choose

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))


def frequencies(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    random = np.random.default_rng(sampling.seed)
    return np.bincount([choose(LOGITS, sampling, random) for _ in range(draws)], minlength=5) / draws


def test_without_temperature_the_most_likely_token_is_taken() -> None:
    assert frequencies(Sampling(temperature=0), 10).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.9, [1, 2, 3, 4]), (0.8, [1, 2, 3]), (0.5, [1, 3]), (0.01, [1])]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_nucleus(top_p: float, kept: list[int], temperature: float) -> None:
    sharpened = np.exp(LOGITS.astype(np.float64)) ** (1 / temperature)
    sharpened /= sharpened.sum()
    order = np.argsort(-sharpened)
    smallest = next(n for n in range(1, 6) if n == 5 or sharpened[order[:n]].sum() > top_p)
    if temperature == 1:
        assert sorted(order[:smallest].tolist()) == kept
    wanted = np.zeros(5)
    wanted[order[:smallest]] = sharpened[order[:smallest]] / sharpened[order[:smallest]].sum()
    np.testing.assert_allclose(frequencies(Sampling(temperature=temperature, top_p=top_p)), wanted, atol=0.03)


def test_the_seed_decides_the_draws() -> None:
    first, again, other = (frequencies(Sampling(temperature=1, seed=seed), 50) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_a_nucleus_of_nothing_is_the_most_likely_token() -> None:
    assert frequencies(Sampling(temperature=1000, top_p=0), 50).tolist() == [0, 1, 0, 0, 0]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([1e30, 0, -1e30], np.float32)
    assert choose(logits, Sampling(temperature=0.5), np.random.default_rng(0)) == 0


class Letters:
    """A tokenizer whose tokens are the bytes of UTF-8; zero ends a text."""

    template = "{{ messages[0].content }}"
    tool_template = None
    special_tokens: ClassVar[dict[str, str]] = {}

    def template_place(self, tools: bool = False) -> str:
        return "here"

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def stop_ids(self) -> set[int]:
        return {0}


class Speaker:
    """A session that says the given tokens one by one."""

    vocab_size, context, runtime, device = 256, 100, "said", "cpu"

    def __init__(self, said: bytes) -> None:
        self._said: Iterator[int] = iter(said)

    def prefill(self, _ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.eye(1, 256, next(self._said), dtype=np.float32)

    def decode(self, _token: int) -> NDArray[np.float32]:
        return np.eye(1, 256, next(self._said), dtype=np.float32)[0]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("said", "stop", "pieces"),
    [
        (b"ab\0", "end", ["a", "b"]),
        ("né!\0".encode(), "end", ["n", "é", "!"]),
        ("海\0".encode(), "end", ["海"]),
        ("n海".encode()[:3] + b"\0", "end", ["n", "\ufffd"]),
        ("na海".encode()[:4], "length", ["n", "a", "\ufffd"]),
    ],
    ids=["ascii", "two bytes", "three bytes", "half a character at the end", "half a character at the limit"],
)
def test_what_is_shown_as_it_grows_is_the_whole_text(
    said: bytes, stop: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character of several tokens is shown when it is whole, and at the end whatever is left."""
    monkeypatch.setattr(generate, "open_session", lambda *_: Speaker(said))
    monkeypatch.setattr(generate, "tokenizer_of", lambda *_: Letters())
    shown: list[str] = []
    limit = Sampling(len(said))
    result = chat(Path("said"), [{"role": "user", "content": "?"}], True, limit, on_text=shown.append)
    assert [piece for piece in shown if piece] == pieces
    assert "".join(shown) == result["text"]
    assert result["stop"] == stop
