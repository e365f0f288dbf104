"""A limit on the length of Qwen3's thoughts, as its model cards describe it.

The first tokens of an answer are the model's own, up to the limit. If neither the thought nor the answer has ended by
then, a sentence that ends the thought is inserted, and the model goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.errors import InputError
from qwen3_export.text.tokenizer import TextModel

END = "</think>"
CUT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{END}\n\n"
)


@dataclass(frozen=True)
class ThinkingBudget:
    """Number of tokens that a thought may have, and the ids that end it."""

    tokens: int
    end: int
    cut: tuple[int, ...]


def thinking_budget(tokenizer: TextModel, tokens: int | None) -> ThinkingBudget | None:
    """The budget with a model's own token ids; None for None.

    Raises InputError when the model has no thoughts.
    """
    if tokens is None:
        return None
    end = tokenizer.encode(END)
    if len(end) != 1:
        raise InputError(f"--thinking-budget: this model has no token {END}, it does not think", "leave it away")
    return ThinkingBudget(tokens, int(end[0]), tuple(int(i) for i in tokenizer.encode(CUT)))


class Thought:
    """One thought in progress."""

    def __init__(self, budget: ThinkingBudget | None) -> None:
        self._budget, self._count = budget, 0
        self._ended = budget is None
        self._queue: list[int] = []
        self.was_cut = False

    def follow(self, chosen: int, stops: frozenset[int] | set[int] = frozenset()) -> int:
        """The next token: `chosen` by the model, or one of the inserted end."""
        if self._queue:
            return self._queue.pop(0)
        if self._ended or self._budget is None:
            return chosen
        if chosen == self._budget.end or chosen in stops:
            self._ended = True
            return chosen
        if self._count >= self._budget.tokens:
            self._ended = self.was_cut = True
            self._queue = list(self._budget.cut)
            return self._queue.pop(0)
        self._count += 1
        return chosen
