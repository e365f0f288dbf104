"""The report folder: report.json, report.md, report.html and report.xml (JUnit).

tables     the result as tables of text    ─▶ markdown, page
charts     the result as pictures (SVG)    ─▶ page
junit      every check as a test case
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.manifest import to_json, write_manifest
from qwen3_export.core.outputs import check_output, staged_folder
from qwen3_export.core.places import Inputs
from qwen3_export.errors import InputWarning
from qwen3_export.prove.report.junit import junit
from qwen3_export.prove.report.markdown import markdown
from qwen3_export.prove.report.page import page
from qwen3_export.text.documents import split_domain

__all__ = ["append_summary", "check_report", "junit", "markdown", "page", "write_report"]


def check_report(folder: str | Path, inputs: Inputs, texts: Iterable[str] = (), force: bool = False) -> None:
    """Raise InputError when a report cannot be written, before the work.

    It may not touch an input, nor a text given as FILE or DOMAIN=FILE.
    """
    check_output(Path(folder), [*inputs, *(split_domain(text)[1] for text in texts)], force)


def write_report(folder: Path, result: Mapping[str, Any], force: bool = False, title: str = "Validation") -> None:
    """Write the result of `validate`, `bench`, `gate`, `compare` or the demo.

    Raises InputError when the folder exists.
    """
    with staged_folder(folder, force) as partial:
        (partial / "report.json").write_text(to_json(result), encoding="utf-8")
        (partial / "report.md").write_text(markdown(result, title), encoding="utf-8")
        (partial / "report.html").write_text(page(result, title), encoding="utf-8")
        (partial / "report.xml").write_bytes(junit(result, title))
        write_manifest(partial, "report", {"title": title})


def append_summary(result: Mapping[str, Any], title: str) -> None:
    """Append the tables to GitHub Actions' job summary, the file `GITHUB_STEP_SUMMARY`.

    Where it cannot be written there is a warning: the result is whole without it.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8", opener=_without_waiting) as file:
            file.write(markdown(result, title) + "\n")
    except OSError as error:
        warnings.warn(f"GITHUB_STEP_SUMMARY: {path} cannot be written ({error.strerror})", InputWarning, stacklevel=2)


def _without_waiting(path: str, flags: int) -> int:
    # Of a pipe that nobody reads, opening would never return.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
