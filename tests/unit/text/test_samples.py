"""Documents in, rows of token ids out: seeds, lengths, domains, hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest

from qwen3_export.errors import InputError
from qwen3_export.text.documents import Document
from qwen3_export.text.samples import Samples, calibration_samples, heldout_samples, subsample


class ByteModel:
    """A tokenizer whose ids are the bytes: what is cut where can be read off."""

    template: str | None = None
    tool_template: str | None = None
    special_tokens: ClassVar[dict[str, str]] = {}

    def template_place(self, tools: bool = False) -> str:
        return "here"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


BYTES: Any = ByteModel()


def numbered(domain: str, count: int, length: int = 10) -> list[Document]:
    """Documents of `length` bytes whose bytes say which document and position they are."""
    return [Document(domain, "".join(chr(33 + (7 * i + j) % 90) for j in range(length))) for i in range(count)]


def test_rows_have_exactly_the_length_asked_for_and_are_pieces_of_the_text() -> None:
    text = "".join(chr(32 + i % 95) for i in range(1000))
    rows = calibration_samples(BYTES, [Document("a", text)], 100, 64, seed=0)
    windows = {text[i : i + 64].encode() for i in range(0, 1000, 64)}
    assert [len(ids) for ids in rows.ids] == [64] * 15
    assert {bytes(ids.tolist()) for ids in rows.ids} == {window for window in windows if len(window) == 64}
    assert all(ids.dtype == np.int32 for ids in rows.ids)
    assert rows.tokens == 15 * 64


def test_documents_are_joined_before_they_are_cut() -> None:
    documents = numbered("a", 20, 10)
    rows = calibration_samples(BYTES, documents, 100, 25, seed=3)
    joined = b"".join(bytes(ids.tolist()) for ids in rows.ids)
    assert len(rows.ids) == 8
    assert Counter(joined) == Counter("".join(str(d.content) for d in documents).encode())


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    documents = numbered("a", 50) + numbered("b", 30)
    first, again, other = (calibration_samples(BYTES, documents, 16, 20, seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256
    assert first.domains == again.domains
    for one, two in zip(first.ids, again.ids, strict=True):
        np.testing.assert_array_equal(one, two)
    assert first.sha256 != other.sha256


def test_rows_are_taken_from_the_domains_in_turn() -> None:
    documents = numbered("a", 100) + numbered("b", 100) + numbered("c", 4)
    rows = calibration_samples(BYTES, documents, 12, 20, seed=0)
    assert Counter(rows.domains) == {"a": 5, "b": 5, "c": 2}
    assert rows.domains[:6] == ("a", "b", "c", "a", "b", "c")


def test_fewer_rows_come_back_when_the_text_is_short() -> None:
    assert len(calibration_samples(BYTES, numbered("a", 5, 10), 100, 20, 0).ids) == 2


@pytest.mark.parametrize("documents", [[], numbered("a", 1, 63), numbered("a", 1, 40) + numbered("b", 1, 40)])
def test_text_without_one_whole_row_is_an_error_that_says_so(documents: list[Document]) -> None:
    with pytest.raises(InputError, match="fewer than 64 tokens in every domain") as caught:
        calibration_samples(BYTES, documents, 8, 64, 0)
    assert caught.value.hint is not None
    assert "--sequence-length" in caught.value.hint


def test_the_hash_is_of_ids_and_row_lengths_and_not_of_domains() -> None:
    ids = np.arange(6, dtype=np.int32)
    digest = hashlib.sha256(
        (4).to_bytes(8, "little") + ids[:4].tobytes() + (2).to_bytes(8, "little") + ids[4:].tobytes()
    )
    assert Samples((ids[:4], ids[4:]), ("a", "b")).sha256 == digest.hexdigest()
    assert Samples((ids[:4], ids[4:]), ("c", "d")).sha256 == digest.hexdigest()
    assert Samples((ids[:2], ids[2:]), ("a", "b")).sha256 != digest.hexdigest()
    assert Samples((ids.astype(np.int64)[:4], ids[4:]), ("a", "b")).sha256 == digest.hexdigest()


def test_held_out_documents_are_cut_in_order_and_short_tails_dropped() -> None:
    documents = [Document("a", "x" * 55), Document("b", "y" * 15), Document("c", "z" * 16)]
    rows = heldout_samples(BYTES, documents, 20)
    assert [(domain, bytes(ids.tolist()).decode()) for domain, ids in zip(rows.domains, rows.ids, strict=True)] == [
        ("a", "x" * 20),
        ("a", "x" * 20),
        ("c", "z" * 16),
    ]


def test_held_out_text_without_a_window_is_an_error() -> None:
    with pytest.raises(InputError, match="no window of 16 tokens"):
        heldout_samples(BYTES, [Document("a", "too short")], 20)


def test_spread_keeps_whole_rows_from_begin_to_end() -> None:
    ids = tuple(np.full(10, i, np.int32) for i in range(10))
    rows = Samples(ids, tuple("abcdefghij"))
    assert subsample(rows, None) is rows
    assert subsample(rows, 100) is rows
    found = subsample(rows, 35)
    assert found.domains == ("a", "e", "j")
    assert [int(row[0]) for row in found.ids] == [0, 4, 9]
    assert len(subsample(rows, 1).ids) == 1


def test_the_documents_that_the_rows_were_cut_from_are_counted() -> None:
    thinking = [{"role": "assistant", "content": "<think>" + "w" * 20 + "</think>"}]
    chats = [Document("chats", thinking)] * 3 + [Document("chats", [{"role": "user", "content": "u" * 40}])] * 2
    documents = [*numbered("texts", 4, 10), *chats]
    everything = calibration_samples(BYTES, documents, 1000, 5, seed=0)
    assert everything.documents == {"chat": 2, "chat-thinking": 3, "text": 4}
    # One row of each domain: 12 bytes of a chat, which may touch two of them, and two texts of 10 bytes.
    few = calibration_samples(BYTES, documents, 2, 12, seed=0)
    assert few.documents["text"] == 2
    assert 1 <= few.documents.get("chat", 0) + few.documents.get("chat-thinking", 0) <= 2
