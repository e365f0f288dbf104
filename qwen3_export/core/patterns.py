"""Regular expressions from other tools' configurations: which of them matches a module's name first.

A short pattern can keep Python's engine busy for ever. Patterns that are certainly cheap are matched here, all others
in a process under limits (`core.confined`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwen3_export.core.confined import ConfinedError, confined

_MOST_LETTERS = 10_000
# Without groups and alternatives and with few repetitions, a pattern takes at most n³ steps for a name of n letters.
_CHEAP, _REPETITIONS = re.compile(r"[\w\-.\\^$*+?\[\]]*"), 3


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """`{name: the first pattern that matches at its beginning}`.

    Names that no pattern matches are absent. Raises ValueError for an invalid pattern, and for one that takes more time
    or memory than the limits allow.
    """
    wanted = list(names)
    if all(_is_cheap(pattern) for pattern in patterns):
        try:
            return match_all(list(patterns), wanted)
        except re.error as error:
            raise ValueError(f"{error}") from error
    if sum(map(len, patterns)) > _MOST_LETTERS:
        raise ValueError(f"its patterns have more than {_MOST_LETTERS} letters")
    try:
        found: dict[str, str] = confined(match_all)(list(patterns), wanted)
    except ConfinedError as error:
        raise ValueError(f"its patterns cannot be used: {error}") from error
    return found


def match_all(patterns: list[str], names: list[str]) -> dict[str, str]:
    """The same without limits, as the child runs it."""
    compiled = [(pattern, re.compile(pattern)) for pattern in patterns]
    first = {name: next((text for text, pattern in compiled if pattern.match(name)), None) for name in names}
    return {name: text for name, text in first.items() if text is not None}


def _is_cheap(pattern: str) -> bool:
    return bool(_CHEAP.fullmatch(pattern)) and sum(map(pattern.count, "*+?")) <= _REPETITIONS
