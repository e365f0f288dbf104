"""Numbers that an export could not store unchanged, and their largest errors."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.errors import UnsupportedError

Inexact = dict[str, Any]
_TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_ROWS = 4096


def max_relative_error(original: NDArray, stored: NDArray) -> float:
    """Largest |stored - original| / max|original| over a tensor; infinity for an overflow."""
    largest = float(np.abs(original).max(initial=0))
    difference = float(np.abs(stored.astype(np.float32) - original.astype(np.float32)).max(initial=0))
    return difference / largest if largest else difference


def refuse_overflow(name: str, error: float, kind: str) -> None:
    """Raise UnsupportedError when a tensor overflows in the type it would be stored in."""
    if not math.isfinite(error):
        raise UnsupportedError(f"{name}: its values overflow in {kind}", "bf16 has the range of fp32: use that")


def cast_errors(checkpoint: Checkpoint, precision: str) -> list[Inexact]:
    """Unquantized tensors and scales that `precision` cannot hold exactly, with errors.

    Raises UnsupportedError on overflow.
    """
    wanted, errors = _TYPES[precision], []
    for name in checkpoint.files:
        entry = checkpoint.entry(name)
        if entry.dtype not in _TYPES.values() or np.can_cast(entry.dtype, wanted):
            continue
        pieces = range(0, entry.shape[0], _ROWS)
        error = 0.0
        for begin in pieces:
            array = checkpoint.rows(name, begin, min(begin + _ROWS, entry.shape[0]))
            with np.errstate(over="ignore"):
                stored = array.astype(wanted)
            error = max(error, max_relative_error(array, stored))
        refuse_overflow(name, error, precision)
        if error:
            errors.append({"name": name, "max_rel_error": error})
    return errors
