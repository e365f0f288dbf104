"""Functions as machine code, by numba.

They are loops over arrays that run without the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# What is added to a small number to leave its nearest integer in the low bits, and taken off again to have it alone.
ROUNDER = np.float32(12582912.0)


def _may_be_kept(function: Callable[..., Any]) -> bool:
    """Whether numba has a folder for it.

    It lies beside the source, or in the home of the user.

    Where a container's user has no home, numba would make a folder called `~` where the command runs.
    """
    beside = Path(function.__code__.co_filename).parent
    kept = beside / "__pycache__"
    if getattr(numba.config, "CACHE_DIR", "") or os.access(kept if kept.is_dir() else beside, os.W_OK):
        return True
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~")).is_absolute()


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Machine code of a function.

    It is kept on the disk where a folder for it can be written, else made anew by each process.
    """
    try:
        return numba.njit(function, nogil=True, cache=_may_be_kept(function), error_model="numpy", **options)
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
