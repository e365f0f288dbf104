"""Tables that fit the terminal.

on a terminal   text columns wrap first; then columns are left out from the right, but never those in `KEPT`
piped           nothing is wrapped or left out, unless COLUMNS sets a width
no UTF-8        rules and marks in ASCII
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

# Columns that are shown at any width, and columns of text that may wrap.
KEPT = frozenset(("artifact", "recipe", "format or runtime", "KL (nats)", "verdict", "works", "metric", "delta"))
_TEXT = frozenset(("artifact", "runtime", "what it does", "why not", "recipe", "tensor", "metric"))
_GAP, _NARROWEST = 2, 12
_ASCII = str.maketrans(
    {"─": "-", "…": "...", "≥": ">=", "≈": "~", "→": "->", "−": "-", "×": "x", "±": "+-", "–": "-", "—": "-"}
)
_COLOURS = {"pass": "32", "yes": "32", "better": "32", "same": "32", "FAIL": "1;31", "no": "31", "worse": "1;31"}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout.

    The first two columns and those that may wrap are left-aligned.
    """
    print(drawn(headers, rows, _width(), _colours()))


def _width() -> int | None:
    """Width of the output in columns, None where it is unlimited."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and 0 < len(asked) < 6:
        return int(asked) or None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str, stream: TextIO | None = None) -> str:
    """The text in characters that a stream can encode, by default stdout."""
    encoding = (getattr(stream or sys.stdout, "encoding", None) or "utf-8").lower()
    if encoding.startswith("utf"):
        return text
    return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)


def drawn(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None, colours: bool = False
) -> str:
    """The table as text.

    It is at most `width` columns wide, unless the columns in `KEPT` need more.
    """
    headers, rows = [plain(header) for header in headers], [[plain(cell) for cell in row] for row in rows]
    shown = list(range(len(headers)))
    natural = [max([cell_len(headers[i]), *(cell_len(row[i]) for row in rows)]) for i in shown]
    widths = dict(enumerate(natural))
    if width is not None:
        shown, widths = _fitted(headers, rows, natural, width)
    lines = [_line(headers, shown, widths, headers)]
    lines.append(" " + "  ".join(plain("─") * widths[i] for i in shown))
    for row in rows:
        lines += _wrapped(row, shown, widths, headers, colours)
    left = [headers[i] for i in range(len(headers)) if i not in shown]
    if left:
        note = f"left out at this width: {', '.join(left)} (all of it: a wider terminal, | cat, --json)"
        lines += textwrap.wrap(note, max(width or 80, 20))
    return "\n".join(["", *(line.rstrip() for line in lines), ""])


def _total(shown: Sequence[int], widths: dict[int, int]) -> int:
    return 1 + sum(widths[i] for i in shown) + _GAP * (len(shown) - 1)


def _fitted(
    headers: Sequence[str], rows: Sequence[Sequence[str]], natural: Sequence[int], width: int
) -> tuple[list[int], dict[int, int]]:
    """The columns that are shown, and the width of each."""
    shown = list(range(len(headers)))
    widths = dict(enumerate(natural))
    smallest = {i: min(natural[i], max(_NARROWEST, cell_len(headers[i]))) for i in shown}
    while True:
        over = _total(shown, widths) - width
        for i in sorted((i for i in shown if headers[i] in _TEXT), key=lambda i: -widths[i]):
            less = min(max(over, 0), widths[i] - smallest[i])
            widths[i] -= less
            over -= less
        if over <= 0:
            return shown, widths
        spare = [i for i in shown if headers[i] not in KEPT]
        if not spare:
            return shown, widths
        shown.remove(spare[-1])
        widths = dict(enumerate(natural))


def _is_text(headers: Sequence[str], index: int) -> bool:
    return index < 2 or headers[index] in _TEXT


def _padded(text: str, width: int, left: bool) -> str:
    space = " " * max(0, width - cell_len(text))
    return text + space if left else space + text


def _line(cells: Sequence[str], shown: Sequence[int], widths: dict[int, int], headers: Sequence[str]) -> str:
    return " " + "  ".join(_padded(cells[i], widths[i], _is_text(headers, i)) for i in shown)


def _wrapped(
    row: Sequence[str], shown: Sequence[int], widths: dict[int, int], headers: Sequence[str], colours: bool
) -> list[str]:
    """One row, on as many lines as its longest text needs."""
    pieces = {i: _pieces(row[i], widths[i]) for i in shown}
    lines = []
    for number in range(max(len(found) for found in pieces.values())):
        cells = []
        for i in shown:
            text = pieces[i][number] if number < len(pieces[i]) else ""
            padded = _padded(text, widths[i], _is_text(headers, i))
            code = _COLOURS.get(text) if colours else None
            cells.append(padded.replace(text, f"\x1b[{code}m{text}\x1b[0m") if code and text else padded)
        lines.append(" " + "  ".join(cells))
    return lines


def _pieces(text: str, width: int) -> list[str]:
    if cell_len(text) <= width:
        return [text]
    # Wide letters take two columns each.
    return textwrap.wrap(text, width if text.isascii() else max(1, width // 2)) or [""]
