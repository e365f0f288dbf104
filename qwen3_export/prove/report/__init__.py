"""The report folder: report.json, report.md, report.html and report.xml (JUnit).

tables     the result as tables of text    ─▶ markdown, page
charts     the result as pictures (SVG)    ─▶ page
junit      every check as a test case
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.manifest import to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.prove.report.junit import junit
from qwen3_export.prove.report.markdown import markdown
from qwen3_export.prove.report.page import page

__all__ = ["append_summary", "junit", "markdown", "page", "write_report"]


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
    """Append the tables to GitHub Actions' job summary, the file `GITHUB_STEP_SUMMARY`."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(markdown(result, title) + "\n")
