"""Runs a command and writes the seconds of each kind of its work.

    python -m benchmarks.scale.timed TIMES.json quantize …        writes {"advance": 12.3, "experts": 80.1, …}

The block loop names its parallel work (`Workers.share`): passes of samples, moments, experts, and others. Seconds are
those of the clock. Work that is part of other work counts as that; reading, factorising and writing have no name.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from qwen3_export.cli import main as command
from qwen3_export.model.workers import Workers


def time_shares() -> dict[str, float]:
    """Have `Workers.share` add up its seconds by label in the dict that is returned."""
    seconds: dict[str, float] = defaultdict(float)
    plain, block_loop = Workers.share, threading.main_thread()
    depth = 0

    def share(self: Workers, label: str, *arguments: Any, **options: Any) -> None:
        nonlocal depth
        if depth or threading.current_thread() is not block_loop:
            plain(self, label, *arguments, **options)
            return
        depth, started = 1, time.monotonic()
        try:
            plain(self, label, *arguments, **options)
        finally:
            depth = 0
            seconds[label] += time.monotonic() - started

    Workers.share = share  # type: ignore[method-assign]
    return seconds


def main() -> None:
    """Run the command that follows the file's name on the command line."""
    target = Path(sys.argv.pop(1))
    seconds = time_shares()
    try:
        command()
    finally:
        target.write_text(json.dumps({label: round(value, 1) for label, value in seconds.items()}))


if __name__ == "__main__":
    main()
