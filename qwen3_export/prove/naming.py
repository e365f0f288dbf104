"""Artifacts as they are given, and their short unique names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from qwen3_export.errors import InputError


def artifact_paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """The paths of one artifact or of several.

    Raises InputError for none, which would pass every limit.
    """
    paths = [Path(artifact) for artifact in ([given] if isinstance(given, str | Path) else given)]
    if not paths:
        raise InputError("no artifact was given: there is nothing to measure", "give paths, such as ['model.gguf']")
    return paths


def unique_names(artifacts: Sequence[str]) -> list[str]:
    """The shortest unique ends of paths; equal paths are numbered."""
    parts = [PurePath(artifact).parts or (artifact,) for artifact in artifacts]
    names = [_shortest(index, parts) for index in range(len(parts))]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _shortest(index: int, parts: Sequence[tuple[str, ...]]) -> str:
    mine = parts[index]
    others = [other for i, other in enumerate(parts) if i != index and other != mine]
    for count in range(1, len(mine) + 1):
        if all(other[-count:] != mine[-count:] for other in others):
            return str(PurePath(*mine[-count:]))
    return str(PurePath(*mine))
