"""Text from an artifact: chat template, prefill, decode until a stop token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.progress import Progress
from qwen3_export.errors import InputError
from qwen3_export.run.artifact import of_a_plan, open_session, plan_line, tokenizer_of
from qwen3_export.run.session import RuntimeOptions, Session
from qwen3_export.run.thinking import Thought, thinking_budget
from qwen3_export.text.tokenizer import TextModel, chat_text


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    thinking_budget: int | None = None


def converse(
    artifact: Path,
    messages: list[dict[str, Any]],
    questions: Iterable[str],
    thinking: bool,
    sampling: Sampling,
    options: RuntimeOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    on_answer: Callable[[dict[str, Any]], None] = lambda _answer: None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Open an artifact and answer questions one after another.

    Each is asked with all that was said before; see `answer`.

    The questions are asked for one by one, after the answer to the last; `on_answer` gets each result.
    """
    history, found, progress = list(messages), [], progress or Progress()
    with progress.bar(f"load {artifact.name}", 1) as tick:
        session = open_session(artifact, options)
        tick()
    if line := plan_line(artifact.name, of_a_plan(session)):
        progress.note(line)
    try:
        tokenizer = tokenizer_of(artifact, session)
        for question in questions:
            if not question.strip():
                raise InputError("the prompt is empty", "say something to the model")
            history.append({"role": "user", "content": question})
            result = answer(session, tokenizer, artifact.name, history, thinking, sampling, on_text)
            history.append({"role": "assistant", "content": result["text"]})
            found.append(result)
            on_answer(result)
    finally:
        session.close()
    return found


def chat(
    artifact: Path,
    messages: list[dict[str, Any]],
    thinking: bool,
    sampling: Sampling,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Open an artifact, answer a chat and close it; see `answer`."""
    session = open_session(artifact, RuntimeOptions(threads=threads))
    try:
        return answer(session, tokenizer_of(artifact, session), artifact.name, messages, thinking, sampling, on_text)
    finally:
        session.close()


def answer(
    session: Session,
    tokenizer: TextModel,
    name: str,
    messages: list[dict[str, Any]],
    thinking: bool,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Answer a chat with an open session.

    `on_text` gets the text as it grows, and may raise to end it early.

    Returns text, counts, speed and stop reason. Raises InputError when the prompt does not fit into the context
    of the model called `name`.
    """
    ids = tokenizer.encode(chat_text(tokenizer, messages, generate=True, thinking=thinking))
    if int(ids.max(initial=0)) >= session.vocab_size:
        raise InputError(f"the prompt has token {ids.max()}, {name} knows {session.vocab_size}")
    room = session.context - len(ids)
    if room < 1:
        raise InputError(f"the prompt has {len(ids)} tokens, {name} holds {session.context}")
    started = time.perf_counter()
    shown = Shown(tokenizer, on_text)
    thought = Thought(thinking_budget(tokenizer, sampling.thinking_budget) if thinking else None)
    tokens, stop = _generate(session, tokenizer, ids, min(sampling.max_new_tokens, room), sampling, shown, thought)
    shown.grow(tokens, last=True)
    seconds = time.perf_counter() - started
    return {
        "text": tokenizer.decode(tokens),
        "prompt_tokens": len(ids),
        "new_tokens": len(tokens),
        "tokens_per_second": len(tokens) / seconds,
        "first_token_seconds": shown.first - started if shown.first else seconds,
        "thought_was_cut": thought.was_cut,
        "stop": stop,
        "runtime": session.runtime,
        "device": session.device,
        **of_a_plan(session),
    }


class Shown:
    """What `on_text` has been given of a growing answer."""

    def __init__(self, tokenizer: TextModel, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text, self._text = tokenizer, on_text, ""
        self.first: float | None = None

    def grow(self, tokens: list[int], last: bool = False) -> None:
        """Hand over what is new.

        A character can be spread over several tokens: it waits until it is whole, unless these are the `last`
        ones.
        """
        self.first = self.first or time.perf_counter()
        if self._on_text is None:
            return
        text = self._tokenizer.decode(tokens)
        if last or not text.endswith("\ufffd"):
            self._on_text(text[len(self._text) :])
            self._text = text


def _generate(
    session: Session,
    tokenizer: TextModel,
    ids: NDArray[np.int32],
    limit: int,
    sampling: Sampling,
    shown: Shown,
    thought: Thought,
) -> tuple[list[int], str]:
    random, stops = np.random.default_rng(sampling.seed), tokenizer.stop_ids()
    tokens: list[int] = []
    logits = session.prefill(ids)[-1]
    while len(tokens) < limit:
        token = thought.follow(choose(logits, sampling, random), stops)
        if token in stops:
            return tokens, "end"
        tokens.append(token)
        shown.grow(tokens)
        if len(tokens) < limit:
            logits = session.decode(token)
    return tokens, "length"


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token: the most likely one, or a draw.

    The draw is from the nucleus of mass `top_p`.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1
    nucleus = order[:count]
    return int(random.choice(nucleus, p=probabilities[nucleus] / probabilities[nucleus].sum()))
