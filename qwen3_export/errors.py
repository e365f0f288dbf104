"""The errors that a user can meet, each with its exit code.

    0 done · 1 a gate failed · 2 bad input or usage · 3 something that must be installed is missing
    4 out of disk or memory · 130 interrupted

Everything below `cli` raises one of these and never prints or exits. Any other exception is a bug of ours, and the
command line says so.
"""

from __future__ import annotations


class ExportError(Exception):
    """Base of all expected errors: what is wrong, and a hint with the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(ExportError):
    """A checkpoint, recipe, argument or file that the user must change (exit code 2)."""


class StateError(InputError):
    """The state of an unfinished run is damaged or belongs to another run.

    The run stops, and the state is kept.
    """


class ClusterError(InputError):
    """The nodes of a cluster cannot do the run; others may.

    What was finished before is kept.
    """


class CheckpointError(InputError):
    """A checkpoint is broken, incomplete or not a Qwen3 model."""


class RecipeError(InputError):
    """A recipe is malformed, or it cannot be applied to this model."""


class UnsupportedError(InputError):
    """A format or runtime cannot hold what was asked for.

    The hint names one that can.
    """


class InputWarning(UserWarning):
    """Something in an input may not mean what its author believes.

    It is reported once, and the work goes on.
    """


class MissingRuntimeError(ExportError):
    """A library, driver, device or network is missing (exit code 3)."""

    exit_code = 3


class ResourceError(ExportError):
    """The disk or the memory is too small (exit code 4)."""

    exit_code = 4
