"""Greedy text compared with the original's: agreement, loops and stops.

    plain         continuations of the first tokens of some held-out rows          `generation`
    chats         answers through the chat template, with and without thinking     `chat_generation`

Texts are compared token by token, those that ended up to and including their stop token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.run.session import Session, greedy
from qwen3_export.run.thinking import ThinkingBudget, Thought

if TYPE_CHECKING:
    from qwen3_export.prove.reference import Continuations

MODES = {"thinking": True, "no_thinking": False}


@dataclass(frozen=True)
class Chats:
    """Token ids of chat prompts and of the original's answers, per mode.

    An answer ends with a token of `stops`, or after `new_tokens` tokens. `budget` limits the thoughts.
    """

    prompts: Mapping[str, tuple[tuple[int, ...], ...]]
    answers: Mapping[str, tuple[tuple[int, ...], ...]]
    stops: tuple[int, ...]
    new_tokens: int
    budget: ThinkingBudget | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, vocab_size: int) -> Chats:
        """The inverse of `to_dict`.

        Raises ValueError, KeyError or TypeError for other values, and for ids beyond the vocabulary.
        """
        budget = values["budget"]
        texts = {
            key: {mode: tuple(_ids(row, vocab_size) for row in values[key][mode]) for mode in MODES}
            for key in ("prompts", "answers")
        }
        if any(len(texts["prompts"][mode]) != len(texts["answers"][mode]) for mode in MODES):
            raise ValueError("chats: prompts and answers are not as many")
        return cls(
            prompts=texts["prompts"],
            answers=texts["answers"],
            stops=_ids(values["stops"], vocab_size, shortest=0),
            new_tokens=int(values["new_tokens"]),
            budget=budget
            and ThinkingBudget(int(budget["tokens"]), int(budget["end"]), _ids(budget["cut"], vocab_size)),
        )


def _ids(values: Any, vocab_size: int, shortest: int = 1) -> tuple[int, ...]:
    ids = tuple(values)
    if len(ids) < shortest or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ValueError("chats: something else than token ids")
    return ids


def ended(tokens: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """The tokens up to and including the first stop token."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tuple(tokens[: place + 1])
    return tuple(tokens)


def generation(session: Session, text: Continuations, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compare plain greedy text with the original's.

    The result has the share of equal tokens, the length of the common prefix, and the number of texts that loop.
    """
    ours = []
    for prompt in text.prompts:
        ours.append(tuple(int(token) for token in greedy(session, prompt, text.tokens.shape[1])))
        tick()
    return _compared(ours, [tuple(int(token) for token in row) for row in text.tokens])


def chat_generation(session: Session, chats: Chats, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compare answers with and without thinking with the original's.

    The result is that of `generation`, and how many answers stop as the original's do.
    """
    found = {}
    for mode in MODES:
        ours = []
        for prompt in chats.prompts[mode]:
            ours.append(answer_ids(session, prompt, chats, mode))
            tick()
        theirs = chats.answers[mode]
        stopped = [(a[-1] in chats.stops, b[-1] in chats.stops) for a, b in zip(ours, theirs, strict=True)]
        found[mode] = {
            **_compared(ours, theirs),
            "stops": sum(a for a, _ in stopped),
            "stops_reference": sum(b for _, b in stopped),
            "stops_as_original": sum(a == b for a, b in stopped),
            "thinking_budget": chats.budget.tokens if chats.budget and MODES[mode] else None,
        }
    return found


def answer_ids(session: Session, prompt: Sequence[int], chats: Chats, mode: str) -> tuple[int, ...]:
    """The artifact's greedy answer, under the stops and limits of the original's."""
    thought, tokens = Thought(chats.budget if MODES[mode] else None), list[int]()
    logits = session.prefill(np.asarray(prompt, np.int32))[-1]
    while True:
        tokens.append(thought.follow(int(logits.argmax()), set(chats.stops)))
        if tokens[-1] in chats.stops or len(tokens) == chats.new_tokens:
            return tuple(tokens)
        logits = session.decode(tokens[-1])


def _compared(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, Any]:
    pairs = list(zip(ours, theirs, strict=True))
    # Tokens after the end of the shorter text count as differing.
    equal = [sum(a == b for a, b in zip(x, y, strict=False)) for x, y in pairs]
    whole = [max(len(x), len(y)) for x, y in pairs]
    lengths = [_common(x, y) for x, y in pairs]
    looping = [(loops(np.asarray(x)), loops(np.asarray(y))) for x, y in pairs]
    return {
        "texts": len(ours),
        "agreement": sum(equal) / sum(whole),
        "agreement_length": float(np.mean(lengths)),
        "reference_length": float(np.mean([len(y) for y in theirs])),
        "loops": sum(a for a, _ in looping),
        "loops_reference": sum(b for _, b in looping),
        "extra_loops": sum(a and not b for a, b in looping),
    }


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the common prefix."""
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        count += 1
    return count


def loops(tokens: NDArray, longest_period: int = 8, repeats: int = 3) -> bool:
    """Whether a text ends in at least `repeats` copies of the same few tokens."""
    for period in range(1, longest_period + 1):
        tail = tokens[-period * repeats :]
        if len(tail) == period * repeats and (tail.reshape(repeats, period) == tail[:period]).all():
            return True
    return False
