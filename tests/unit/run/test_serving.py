"""Many chats in one server: what a cancelled request, a failed step and a full queue cost, counted in decode calls."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.run import serving
from qwen3_export.run.generate import Sampling
from qwen3_export.run.serving import Chat, Server
from tests.unit.run.test_generate import Letters

PATIENCE = 20.0
VOCABULARY = 256


class Counted:
    """A batch that says the next letter of every sequence; each sequence keeps what was appended to it."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.sequences: list[list[int]] = []
        self.steps: list[int] = []
        self.left: list[str] = []
        self.refuses = ""

    def admit(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        assert len(self.sequences) < self.slots, "more sequences than slots"
        self.sequences.append(ids.tolist())
        return self._logits(self.sequences[-1])

    def step(self, tokens: list[int]) -> NDArray[np.float32]:
        if self.refuses:
            raise MemoryError(self.refuses)
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.append(token)
        self.steps.append(len(tokens))
        return np.stack([self._logits(sequence) for sequence in self.sequences])

    def leave(self, number: int) -> None:
        gone, last = self.sequences[number], self.sequences.pop()
        if gone is not last:
            self.sequences[number] = last
        self.left.append(bytes(gone).decode())

    def _logits(self, sequence: list[int]) -> NDArray[np.float32]:
        return np.eye(1, VOCABULARY, sequence[-1] + 1, dtype=np.float32)[0]


class Model:
    """What the server asks of a session."""

    context = 1000


class Client:
    """One request and what came back; `cancel_after` pieces of text it is gone."""

    def __init__(self, prompt: str, tokens: int, cancel_after: int | None = None) -> None:
        self.pieces: list[str] = []
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.done, self._cancel_after = threading.Event(), cancel_after
        messages = [{"role": "user", "content": prompt}]
        self.chat = Chat(messages, True, Sampling(tokens), self._on_text, self._on_end, self._on_error)

    def _on_text(self, text: str) -> None:
        if len(self.pieces) == self._cancel_after:
            raise ConnectionError("the client is gone")
        if text:
            self.pieces.append(text)

    def _on_end(self, result: dict[str, Any]) -> None:
        self.result = result
        self.done.set()

    def _on_error(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class Held(Client):
    """A request whose first piece of text is held back until the others are queued."""

    def __init__(self, prompt: str, tokens: int) -> None:
        super().__init__(prompt, tokens)
        self.begun, self.go = threading.Event(), threading.Event()

    def _on_text(self, text: str) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        super()._on_text(text)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A server over a counted batch, closed at the end."""

    @contextmanager
    def start(slots: int, waiting: int = 16) -> Iterator[tuple[Server, Counted]]:
        batch = Counted(slots)
        monkeypatch.setattr(serving, "batch_of", lambda _session, _slots: batch)
        server: Server = Server(Model(), Letters(), "letters", slots, waiting)  # type: ignore[arg-type]
        yield server, batch
        server.close()
        assert batch.sequences == []

    return start


def answered_together(server: Server, clients: list[Client]) -> None:
    """All are queued before the first is answered, so that they share its steps."""
    first = Held("k", 1)
    server.submit(first.chat)
    assert first.begun.wait(PATIENCE)
    for client in clients:
        server.submit(client.chat)
    first.go.set()
    for client in clients:
        assert client.done.wait(PATIENCE)


def test_a_cancelled_request_is_decoded_no_further_and_the_others_are(serve: Callable) -> None:
    """It is the first of three, so that the last one takes its number."""
    gone, others = Client("a", 60, cancel_after=2), [Client("A", 9), Client("0", 9)]
    with serve(slots=3) as (server, batch):
        answered_together(server, [gone, *others])
    assert isinstance(gone.error, ConnectionError)
    assert (gone.pieces, gone.result) == (["b", "c"], None)
    # Every first token is the prefill's. The third one of the cancelled request finds its client gone.
    assert batch.steps == [3, 3, *[2] * 6]
    assert batch.left == ["k", "abc", "ABCDEFGHI", "012345678"]
    assert [client.result["text"] for client in others if client.result] == ["BCDEFGHIJ", "123456789"]


def test_a_cancelled_request_makes_room_for_one_that_waits(serve: Callable) -> None:
    gone, waiting = Client("a", 60, cancel_after=1), Client("A", 3)
    with serve(slots=1) as (server, batch):
        answered_together(server, [gone, waiting])
    assert batch.steps == [1, 1, 1]
    assert waiting.result == {"text": "BCD", "prompt_tokens": 1, "new_tokens": 3, "stop": "length"}


def test_a_request_that_is_cancelled_in_the_queue_is_never_begun(serve: Callable) -> None:
    gone = Client("a", 60, cancel_after=0)
    with serve(slots=1) as (server, batch):
        answered_together(server, [gone])
    assert isinstance(gone.error, ConnectionError)
    assert (batch.steps, batch.left) == ([], ["k"])


def test_a_failed_step_ends_its_requests_and_not_the_server(serve: Callable) -> None:
    lost, later = [Client("a", 5), Client("A", 5)], Client("0", 2)
    with serve(slots=2) as (server, batch):
        batch.refuses = "no room"
        answered_together(server, lost)
        batch.refuses = ""
        server.submit(later.chat)
        assert later.done.wait(PATIENCE)
    assert [str(client.error) for client in lost] == ["no room"] * 2
    assert later.result
    assert later.result["text"] == "12"


def test_a_full_queue_refuses_at_once(serve: Callable) -> None:
    held, waits = Held("k", 1), Client("a", 2)
    with serve(slots=1, waiting=1) as (server, _):
        server.submit(held.chat)
        assert held.begun.wait(PATIENCE)
        server.submit(waits.chat)
        with pytest.raises(queue.Full):
            server.submit(Client("A", 2).chat)
        held.go.set()
        assert waits.done.wait(PATIENCE)
    assert waits.result


def test_a_stop_token_ends_an_answer(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "stop_ids", lambda _self: {ord("d")})
    client = Client("a", 60)
    with serve(slots=1) as (server, batch):
        answered_together(server, [client])
    assert client.result == {"text": "bc", "prompt_tokens": 1, "new_tokens": 2, "stop": "end"}
    assert batch.steps == [1, 1]
