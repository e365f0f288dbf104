"""The reference model's tokenizer files, which every checkpoint of the benchmarks shares."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen3_export.core.source import locate

SIDECARS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def copy_sidecars(folder: Path) -> None:
    """The reference model's tokenizer: all checkpoints read the same text."""
    for name in SIDECARS:
        path = locate("reference-model") / name
        if path.is_file():
            shutil.copy(path, folder / name)
