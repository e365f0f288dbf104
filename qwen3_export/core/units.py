"""Sizes as people write them."""

from __future__ import annotations

import math
import re

# No machine has an exabyte of anything; a float has no more digits for it either.
_MOST = 1e18
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def binary_size(count: float, up: bool = True) -> str:
    """Bytes as `--memory` takes them: `1.25 GiB`, `500 MiB`.

    They are rounded up, so that what is said to be needed is enough when it is given.
    """
    unit, name = next((pair for pair in _BINARY if count >= pair[0]), _BINARY[-1])
    precision = 100 if unit == 2**30 else 10
    rounded = (math.ceil if up else math.floor)(count / unit * precision) / precision
    return f"{rounded:.10g} {name}"


def parse_size(text: str) -> int | None:
    """Bytes of `8GiB`, `9MB`, `500 kB` or a plain number.

    None when the text is no size, or one beyond all machines.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else math.inf
    return int(size) if size < _MOST else None
