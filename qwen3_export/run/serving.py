"""Answering many chats with one artifact.

Requests wait in a bounded queue. Those in progress are decoded together, one token of each per step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.errors import InputError
from qwen3_export.run.batch import batch_of
from qwen3_export.run.generate import Sampling, Shown, choose
from qwen3_export.run.session import Session
from qwen3_export.text.tokenizer import TextModel, chat_text


@dataclass(frozen=True)
class Chat:
    """One request.

    `on_text` is called with the answer as it grows, and may raise an exception to end it. At the end either `on_end` is
    called with the result, `{text, prompt_tokens, new_tokens, stop}`, or `on_error` with the error.
    """

    messages: list[dict[str, Any]]
    thinking: bool
    sampling: Sampling
    on_text: Callable[[str], None]
    on_end: Callable[[dict[str, Any]], None]
    on_error: Callable[[Exception], None]


class _Running:
    """A chat that is being answered."""

    def __init__(self, chat: Chat, tokenizer: TextModel, session: Session, name: str) -> None:
        self.chat, self._tokenizer = chat, tokenizer
        text = chat_text(tokenizer, chat.messages, generate=True, thinking=chat.thinking)
        self.ids = tokenizer.encode(text)
        if len(self.ids) >= session.context:
            raise InputError(f"the prompt has {len(self.ids)} tokens, {name} holds {session.context}")
        self._limit = min(chat.sampling.max_new_tokens, session.context - len(self.ids))
        self._random, self._stops = np.random.default_rng(chat.sampling.seed), tokenizer.stop_ids()
        self._shown, self.tokens = Shown(tokenizer, chat.on_text), list[int]()

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Choose the next token; returns whether the answer goes on.

        Raises what `on_text` raises.
        """
        token = choose(logits, self.chat.sampling, self._random)
        if token in self._stops:
            self._end("end")
            return False
        self.tokens.append(token)
        self._shown.grow(self.tokens)
        if len(self.tokens) < self._limit:
            return True
        self._end("length")
        return False

    def _end(self, stop: str) -> None:
        self._shown.grow(self.tokens, last=True)
        counts = {"prompt_tokens": len(self.ids), "new_tokens": len(self.tokens)}
        self.chat.on_end({"text": self._tokenizer.decode(self.tokens), **counts, "stop": stop})


class Server:
    """One thread that answers chats.

    Up to `slots` are answered at the same time, up to `waiting` wait in the queue.
    """

    def __init__(self, session: Session, tokenizer: TextModel, name: str, slots: int, waiting: int) -> None:
        self._session, self._tokenizer, self._name = session, tokenizer, name
        self._batch = batch_of(session, slots)
        self._queue: queue.Queue[Chat | None] = queue.Queue(waiting)
        self._running: list[_Running] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, chat: Chat) -> None:
        """Queue a chat; raises `queue.Full` when the queue is full."""
        self._queue.put_nowait(chat)

    def close(self) -> None:
        """Answer all queued chats, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        closing = False
        while not closing or self._running:
            while not closing and len(self._running) < self._batch.slots:
                try:
                    chat = self._queue.get(block=not self._running)
                except queue.Empty:
                    break
                closing = chat is None
                if chat is not None:
                    self._begin(chat)
            if self._running:
                self._step()

    def _begin(self, chat: Chat) -> None:
        try:
            chat.on_text("")  # the client is gone already
            running = _Running(chat, self._tokenizer, self._session, self._name)
            logits = self._batch.admit(running.ids)
        except Exception as error:  # one request must not end the others
            chat.on_error(error)
            return
        self._running.append(running)
        self._take(len(self._running) - 1, logits)

    def _step(self) -> None:
        try:
            logits = self._batch.step([running.tokens[-1] for running in self._running])
        except Exception as error:
            for number in reversed(range(len(self._running))):
                self._drop(number).chat.on_error(error)
            return
        # From the last to the first: when one ends, the sequence that takes its number has already had its turn.
        for number in reversed(range(len(self._running))):
            self._take(number, logits[number])

    def _take(self, number: int, logits: NDArray[np.float32]) -> None:
        try:
            if not self._running[number].take(logits):
                self._drop(number)
        except Exception as error:
            self._drop(number).chat.on_error(error)

    def _drop(self, number: int) -> _Running:
        """Drop a sequence; the last one takes its number, as in the batch."""
        self._batch.leave(number)
        gone, last = self._running[number], self._running.pop()
        if gone is not last:
            self._running[number] = last
        return gone
