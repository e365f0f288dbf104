"""Texts that several tests of documents and tokenizers share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_lines(path: Path, *items: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
