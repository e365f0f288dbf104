"""Artifacts that could not be measured: each stands in the report with its error.

The others are measured all the same. `failed` of a result has an entry for each:

    artifact · error: one line · hint, or null · exit_code, that of the error · node, with --cluster
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_export.core.disk import FULL
from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.progress import Progress
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError

_KINDS: dict[int, type[ExportError]] = {
    kind.exit_code: kind for kind in (InputError, MissingRuntimeError, ResourceError)
}
_BUG = "this is a bug of qwen3-export: please report it with the traceback, which --verbose shows"


def measure_each(
    artifacts: Sequence[Path], measure: Callable[[int], dict[str, Any]], progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results and failures of `measure`, which gets each artifact's number.

    The error of a single artifact is raised: there is nothing else to report.
    """
    results, failed = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, artifact in enumerate(artifacts):
        try:
            results.append(measure(number))
        except Exception as error:
            if len(artifacts) == 1:
                raise
            progress.log(traceback.format_exc().rstrip())
            failed.append(failure(artifact, expected(artifact, error)))
    return results, failed


def expected(artifact: Path, error: Exception) -> ExportError:
    """The error in the words that the command line has for it."""
    if isinstance(error, ExportError):
        return error
    if lacks_memory(error):
        return out_of_memory(artifact, error)
    if isinstance(error, OSError) and error.errno is not None:
        kind = ResourceError if error.errno in FULL else InputError
        return kind(f"{artifact}: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
    return ExportError(f"{artifact}: unexpected {type(error).__name__}: {error}", _BUG)


def failure(artifact: Path, error: ExportError) -> dict[str, Any]:
    """The entry of `failed` for an artifact."""
    text = (str(error).strip() or "unknown").splitlines()[0]
    return {"artifact": str(artifact), "error": text, "hint": error.hint, "exit_code": error.exit_code}


def first_error(result: Mapping[str, Any]) -> ExportError | None:
    """The error that a command ends with, None where all were measured."""
    failed = result.get("failed") or []
    if not failed:
        return None
    total, first = len(failed) + len(result["results"]), failed[0]
    others = f"{len(failed)} of {total} artifacts could not be measured, the first: " if len(failed) > 1 else ""
    return _KINDS[first["exit_code"]](others + first["error"], first["hint"])
