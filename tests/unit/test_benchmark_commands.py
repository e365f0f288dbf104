"""Every benchmark that a page names can be started, and every benchmark is named in the benchmarks' own page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
STARTED = re.compile(r"python -m (benchmarks(?:\.[a-z]\w*)*)")


def file_of(name: str) -> Path:
    """The file that `python -m NAME` runs."""
    path = ROOT.joinpath(*name.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_benchmarks_that_pages_name_can_be_started() -> None:
    said = {name for page in PAGES for name in STARTED.findall(page.read_text(encoding="utf-8"))}
    assert len(said) > 12
    for name in said:
        assert "__main__" in file_of(name).read_text(encoding="utf-8"), name


def test_every_benchmark_is_named() -> None:
    said = set(STARTED.findall((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "benchmarks").rglob("__main__.py")}
    assert there <= said
