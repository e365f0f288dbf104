"""Loops over arrays, compiled by numba, that run without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# Adding this to a small number and subtracting it again rounds the number to the nearest integer.
ROUNDER = np.float32(12582912.0)


def _may_be_kept(function: Callable[..., Any]) -> bool:
    """Whether there is a folder where numba may keep the machine code.

    It lies beside the source or in the user's home. Where a container's user has no home, numba would make a folder
    called `~` in the working directory.
    """
    beside = Path(function.__code__.co_filename).parent
    kept = beside / "__pycache__"
    if getattr(numba.config, "CACHE_DIR", "") or os.access(kept if kept.is_dir() else beside, os.W_OK):
        return True
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~")).is_absolute()


@lru_cache
def _stamp_of(folder: Path) -> float:
    """When a module of a folder last changed, or one that loops elsewhere call."""
    here = Path(__file__).parent
    return max(path.stat().st_mtime for place in {folder, here, here.parent / "ggml"} for path in place.glob("*.py"))


def _follow_siblings(compiled_function: Any, folder: Path) -> None:
    """Forget kept machine code when modules that a function calls change.

    numba asks only whether the function's own module changed, though the code of what it calls is part of its own.
    """
    kept = getattr(getattr(compiled_function, "_cache", None), "_cache_file", None)
    if kept is not None:
        kept._source_stamp = (kept._source_stamp, _stamp_of(folder))


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Machine code of a function, kept on the disk where possible."""
    try:
        found = numba.njit(function, nogil=True, cache=_may_be_kept(function), error_model="numpy", **options)
    except RuntimeError:
        return numba.njit(function, nogil=True, error_model="numpy", **options)
    _follow_siblings(found, Path(function.__code__.co_filename).parent)
    return found


def contracted(function: Callable[..., Any]) -> Any:
    """As `compiled`; a multiplication and an addition may become one fused operation."""
    return compiled(function, fastmath={"contract"})


def reassociated(function: Callable[..., Any]) -> Any:
    """As `contracted`; the terms of a sum may be added in another order."""
    return compiled(function, fastmath={"contract", "reassoc"})
