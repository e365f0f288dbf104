"""The errors that a user can meet, each with the exit code of the command line.

    0 done · 1 a gate failed · 2 bad input or usage · 3 something that must be installed is missing
    4 out of disk or memory · 130 interrupted

Everything below `cli.py` raises one of these and never prints or exits; any other exception is a
bug of ours and is shown as such.
"""

from __future__ import annotations


class ExportError(Exception):
    """Base of all expected errors: one line that says what is wrong, one hint that says the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(ExportError):
    """Bad checkpoint, recipe, argument or file: the user must change the input (exit code 2)."""


class StateError(InputError):
    """What an unfinished run left is damaged, or another run's: it is kept, and refused."""


class CheckpointError(InputError):
    """A checkpoint folder or one of its files is broken, incomplete or not a Qwen3 model."""


class RecipeError(InputError):
    """A recipe is malformed, or it cannot be applied to this model."""


class UnsupportedError(InputError):
    """The request is well formed, but a format or runtime cannot hold it; the hint names what can."""


class InputWarning(UserWarning):
    """Something in an input that is not what its author may believe; the work goes on, and it is told once."""


class MissingRuntimeError(ExportError):
    """A library, driver, device or network that this request needs is absent (exit code 3)."""

    exit_code = 3


class ResourceError(ExportError):
    """The disk or the memory is too small (exit code 4)."""

    exit_code = 4
