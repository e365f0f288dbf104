"""The errors that a user can meet, each with its exit code.

    0 done · 1 a gate failed · 2 bad input or usage · 3 something that must be installed is missing
    4 out of disk or memory · 130 interrupted

Everything below `cli` raises one of these and never prints or exits; any other exception is a
bug of ours and is shown as such.
"""

from __future__ import annotations


class ExportError(Exception):
    """Base of all expected errors.

    It has one line that says what is wrong, and one hint that says the remedy.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(ExportError):
    """Bad checkpoint, recipe, argument or file (exit code 2).

    The user must change the input.
    """


class StateError(InputError):
    """What an unfinished run left is damaged, or another run's.

    It is kept, and refused.
    """


class CheckpointError(InputError):
    """A checkpoint is broken, incomplete or not a Qwen3 model."""


class RecipeError(InputError):
    """A recipe is malformed, or it cannot be applied to this model."""


class UnsupportedError(InputError):
    """The request is well formed, but a format or runtime cannot hold it.

    The hint names what can.
    """


class InputWarning(UserWarning):
    """Something in an input that is not what its author may believe.

    The work goes on, and it is told once.
    """


class MissingRuntimeError(ExportError):
    """A library, driver, device or network is missing (exit code 3)."""

    exit_code = 3


class ResourceError(ExportError):
    """The disk or the memory is too small (exit code 4)."""

    exit_code = 4
