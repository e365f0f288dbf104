"""Functions as machine code, by numba.

They are loops over arrays that run without the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# What is added to a small number to leave its nearest integer in the low bits, and taken off again to have it alone.
ROUNDER = np.float32(12582912.0)


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Machine code of a function.

    It is kept on the disk where a folder for it can be written, else made anew by each process.
    """
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy", **options)
    except RuntimeError:
        return numba.njit(function, nogil=True, error_model="numpy", **options)


def contracted(function: Callable[..., Any]) -> Any:
    """As `compiled`.

    A product and the sum that it goes into may be rounded together.
    """
    return compiled(function, fastmath={"contract"})


def reassociated(function: Callable[..., Any]) -> Any:
    """As `contracted`; sums may be made in another order, many terms side by side."""
    return compiled(function, fastmath={"contract", "reassoc"})
