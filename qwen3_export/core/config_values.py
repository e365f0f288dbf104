"""Values of a `config.json`, checked one by one.

`where` names the file in errors. A value that is absent or null is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_export.errors import CheckpointError


def read_size(values: Mapping[str, Any], key: str, where: str, default: Any = None, most: int = 2**31 - 1) -> int:
    """A whole number from 1 to `most`; CheckpointError for anything else."""
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= most:
        raise CheckpointError(f"{where}: {key} is {value!r}, a positive whole number up to {most} was expected")
    return value


def read_flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false, false when absent; CheckpointError for anything else."""
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, true or false was expected")
    return bool(value)


def read_number(values: Mapping[str, Any], key: str, where: str, default: float | None) -> float:
    """A finite number above 0; CheckpointError for anything else."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{where}: {key} is {value!r}, a positive number was expected")
    return float(value)
