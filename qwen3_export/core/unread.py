"""Options that were given and change nothing."""

from __future__ import annotations

from collections.abc import Mapping


def no_effect(given: Mapping[str, object], reason: str) -> str | None:
    """A warning that names options without effect, None where none was given.

    `given` are their values by name, None where an option was not given.
    """
    named = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None]
    if not named:
        return None
    return f"{' and '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: {reason}"
