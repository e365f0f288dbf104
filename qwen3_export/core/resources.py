"""Where the shipped data lives: `recipes/` and `calibration/`, with the reference model inside.

In a wheel they sit in the package as `qwen3_export/data/…`; in a checkout at the repository's root.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def resource(name: str) -> Path:
    """Path of a shipped folder or file, e.g. `recipes` or `calibration/heldout.jsonl`."""
    packaged = _PACKAGE / "data" / name
    return packaged if packaged.exists() else _PACKAGE.parent / name
