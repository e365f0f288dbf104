"""The display of a command: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qwen3_export.cli.tables import plain, table
from qwen3_export.core.progress import Progress

_AT_ONCE = 0.1
__all__ = ["Console", "fields", "nats", "size", "table", "tell", "verdict", "yaml_text"]


class Console(Progress):
    """Bars with ETA when stderr is a terminal, plain lines otherwise, nothing when quiet."""

    def __init__(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._warned = set[str]()
        self._live = sys.stderr.isatty() and not quiet

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """See `Progress.bar`."""
        if not self._live:
            started = time.monotonic()
            yield lambda: None
            seconds = time.monotonic() - started
            # A step that took no time is worth a line only with --verbose.
            (self.say if seconds >= _AT_ONCE else self.log)(f"{label}: done in {seconds:.1f} s")
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=RichConsole(stderr=True)) as bars:
            task = bars.add_task(label, total=total)
            yield lambda: bars.advance(task)

    def say(self, text: str) -> None:
        """Print a line of progress, unless --quiet."""
        if not self.quiet:
            print(plain(text, sys.stderr), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line about how the work goes, unless --quiet."""
        self.say(text)

    def log(self, text: str) -> None:
        """Print a line of detail with --verbose."""
        if self.verbose:
            self.say(text)

    def warn(self, text: str) -> None:
        """Print a warning once, unless --quiet."""
        if text not in self._warned:
            self._warned.add(text)
            self.say(f"warning: {text}")

    def result(self, values: dict[str, Any], lines: Callable[[], None]) -> None:
        """Print the result: one JSON object with --json, else what `lines` prints."""
        if self.json:
            encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
            print(json.dumps(values, ensure_ascii=not encoding.startswith("utf")))
        else:
            lines()


def tell(text: str) -> None:
    """Print a line of the result on stdout."""
    print(plain(text))


def yaml_text(values: dict[str, Any]) -> str:
    """A result as YAML, in characters that stdout can encode."""
    import yaml

    return plain(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))


def fields(values: dict[str, Any]) -> None:
    """Print `name  value` lines on stdout."""
    width = max(map(len, values))
    for name, value in values.items():
        print(plain(f"{name:<{width}}  {value}"))


def nats(item: Mapping[str, Any]) -> str:
    """Mean KL of a validation result, as `marked_kl` writes it."""
    from qwen3_export.prove.report.numbers import marked_kl

    return marked_kl(item, 5)


def size(count: float) -> str:
    """A number of bytes as text: `7.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def verdict(item: Mapping[str, Any]) -> str:
    """`pass`, `FAIL`, or `-` when no limit was given."""
    if not item["gate"]["checks"]:
        return "-"
    return "pass" if item["gate"]["passed"] else "FAIL"
