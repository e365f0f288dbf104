"""Numbers that an export could not store unchanged, and their largest errors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.errors import UnsupportedError

Inexact = dict[str, Any]
_TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_ROWS = 4096
# The share of a tensor's power beyond which it counts as lost, as in a quantize run.
_LOST = 0.5
# Scales up to here stand for rows of zeros, which are zeros in every type.
_EMPTY = 2.0**-99


class Change(NamedTuple):
    """What storing some numbers in another type has cost.

    The largest |δ| and |x|, Σ δ² and Σ x².
    """

    furthest: float = 0.0
    largest: float = 0.0
    missed: float = 0.0
    whole: float = 0.0

    def joined(self, other: Change) -> Change:
        """Of both together."""
        furthest, largest = max(self.furthest, other.furthest), max(self.largest, other.largest)
        return Change(furthest, largest, self.missed + other.missed, self.whole + other.whole)

    @property
    def error(self) -> float:
        """The largest error, relative to the largest number; infinity for an overflow."""
        return self.furthest / self.largest if self.largest else self.furthest

    @property
    def lost(self) -> float:
        """The share of the power that is gone.

        Squares of the smallest numbers are 0 in fp32: the largest error stands for them.
        """
        return self.missed / self.whole if self.whole else self.error


def change_of(original: NDArray, stored: NDArray) -> Change:
    """The change from one array to the other."""
    single = original.astype(np.float32).reshape(-1)
    with np.errstate(invalid="ignore"):
        difference = stored.astype(np.float32).reshape(-1) - single
    furthest, largest = (float(np.abs(values).max(initial=0)) for values in (difference, single))
    if not largest or not math.isfinite(furthest):
        return Change(furthest, largest)
    # Relative to the largest number, whose square may be 0 in fp32.
    scaled = [values / np.float32(largest) for values in (difference, single)]
    return Change(furthest, largest, *(float(np.dot(values, values)) * largest**2 for values in scaled))


def refuse_lost(name: str, change: Change, kind: str) -> None:
    """Raise UnsupportedError for a tensor whose numbers are too small for their type."""
    if change.lost > _LOST:
        raise UnsupportedError(
            f"{name}: in {kind} it loses {change.lost:.0%} of its power (at most {_LOST:.0%} is written)",
            "bf16 has the range of fp32: use that for it",
        )


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
        scheme = checkpoint.schemes.get(name.rpartition(".")[0])
        # The numbers above NVFP4's scales are judged with these scales, by `ship.tensorrt.scale_errors`.
        if scheme is not None and scheme.scale_dtype == "e4m3":
            continue
        if entry.dtype not in _TYPES.values() or np.can_cast(entry.dtype, wanted):
            continue
        rows = entry.shape[0] if entry.shape else 1
        pieces = range(0, rows, _ROWS)
        change = Change()
        for begin in pieces:
            array = checkpoint.rows(name, begin, min(begin + _ROWS, rows))
            with np.errstate(over="ignore"):
                stored = array.astype(wanted)
            change = change.joined(change_of(array, stored))
        refuse_overflow(name, change.furthest, precision)
        if scheme is None or change.largest > _EMPTY:
            refuse_lost(name, change, precision)
        if change.furthest:
            errors.append({"name": name, "max_rel_error": change.error})
    return errors
