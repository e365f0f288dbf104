"""Regular expressions from other tools' configurations: which of them matches a module's name first.

Python's engine has no limit of time, and a short pattern can ask for more steps than there are atoms. What is
plainly cheap is matched here; everything else in a process of its own under limits (`core.confined`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwen3_export.core.confined import ConfinedError, confined

_MOST_LETTERS = 10_000
# No groups and no alternatives, few repetitions: at most the cube of a name's length in steps.
_CHEAP, _REPETITIONS = re.compile(r"[\w\-.\\^$*+?\[\]]*"), 3


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """`{name: the first pattern that matches at its beginning}`.

    Names that none matches are absent.

    Raises ValueError when a pattern is none, or takes more than the limits of time and memory.
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
    """The same without limits: what runs in the child."""
    compiled = [(pattern, re.compile(pattern)) for pattern in patterns]
    first = {name: next((text for text, pattern in compiled if pattern.match(name)), None) for name in names}
    return {name: text for name, text in first.items() if text is not None}


def _is_cheap(pattern: str) -> bool:
    return bool(_CHEAP.fullmatch(pattern)) and sum(map(pattern.count, "*+?")) <= _REPETITIONS
