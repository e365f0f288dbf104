"""The page of GGUF figures and the guide's table are what the program writes from the measured rows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.gguf.report import BEGIN, END, add, bits_per_weight, quality, write_guide, write_page, write_readme

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-gguf.json"


def test_page_and_guide_are_written_from_the_results(tmp_path: Path) -> None:
    results, guide = tmp_path / RESULTS.name, tmp_path / "cpu.md"
    shutil.copy(RESULTS, results)
    shutil.copy(ROOT / "docs" / "cpu.md", guide)
    write_page(results)
    write_guide(results, guide)
    assert results.with_suffix(".md").read_text() == RESULTS.with_suffix(".md").read_text()
    assert guide.read_text() == (ROOT / "docs" / "cpu.md").read_text()


def cells(text: str) -> dict[tuple[str, str], str]:
    """`{(file type, column): cell}` of the table between the report's marks."""
    written = text.split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if line[:1] == "|"]
    header, _, *lines = rows
    return {(row[0], column): cell for row in lines for column, cell in zip(header, row, strict=True)}


def test_the_readmes_table_is_written_from_the_results(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(text)
    write_readme(RESULTS, readme)
    # Compared cell by cell, so that a difference is named; then as a whole.
    assert cells(text) == cells(readme.read_text()), "python -m benchmarks.gguf.report writes the table again"
    assert text == readme.read_text()


def test_the_readmes_cells_are_those_of_the_rows() -> None:
    rows = {
        (row["type"], row["way"]): row
        for row in json.loads(RESULTS.read_text())["quality"]
        if row["checkpoint"] == "reference-model"
    }
    found = cells((ROOT / "README.md").read_text())
    types = {name for name, _ in found}
    assert {"`q4_k_m`", "`q4_0`", "`q2_k`"} <= types
    for name in types:
        solved, best = (rows[name.strip("`"), way] for way in ("ours solved", "llama.cpp imatrix"))
        shown = {"MB": f"{solved['bytes'] / 1e6:.2f}", "solved": f"{solved['kl']:.4f}"}
        shown["`llama-quantize`, matrix"] = f"{best['kl']:.4f}"
        assert {column: found[name, column] for column in shown} == shown, name


def test_a_gap_above_its_aim_is_marked() -> None:
    row = {
        "checkpoint": "m", "type": "q4_0", "positions": 1, "samples": 1, "sequence_length": 1, "bytes": 1, "top1": 1.0,
        "kl_error": 0.1,
    }  # fmt: skip
    for kl, shown in ((1.1, "1.100 holds"), (1.102, "1.102 missed")):
        assert f"| {shown} |" in quality([{**row, "way": "ours solved", "kl": kl, "kl_torch": 1.0}])


def test_rows_with_the_same_key_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    row = {"model": "m", "job": "ours q8_0", "cpu_s": 2.0, "wall_s": 1.0, "peak_rss": 10**8}
    add(path, "cost", [row, {**row, "job": "converter q8_0"}])
    add(path, "cost", [{**row, "cpu_s": 3.0}])
    found = {item["job"]: item["cpu_s"] for item in json.loads(path.read_text())["cost"]}
    assert found == {"ours q8_0": 3.0, "converter q8_0": 2.0}
    assert "| ours q8_0 | 3.0 | 1.0 | 100 |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(("name", "bits"), [("q8_0", 8.5), ("q6_k", 6.5625), ("q4_k_m", 4.90)])
def test_bits_per_weight_are_those_of_the_mix(name: str, bits: float) -> None:
    assert bits_per_weight(name) == pytest.approx(bits, abs=0.01)


def test_the_readmes_figures_are_those_of_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"`gguf-q4_k_m` has ([\d.]+) .*?, and ([\d.]+) of it with outlier .*?\. "
        r"`edge-w4-mixed` has ([\d.]+) and ([\d.]+) of .*?, "
        r"`edge-w4` ([\d.]+) and ([\d.]+) at ([\d.]+) of",
        readme,
    )
    assert said
    kl = {(row["checkpoint"], row["type"], row["way"]): row["kl"] for row in json.loads(RESULTS.read_text())["quality"]}
    found = [
        f"{kl[name, 'q4_k_m', 'ours solved'] / kl[name, 'q4_k_m', 'llama.cpp imatrix']:.2f}"
        for name in ("reference-model", "outliers")
    ]
    onnx = RESULTS.with_name("2026-11-onnx.md").read_text()
    for recipe in ("edge-w4-mixed", "edge-w4"):
        found += re.findall(rf"\| {recipe} \|.*\| ([\d.]+) × builder int4[ ,|]", onnx)
    found.append(re.findall(r"\| edge-w4 \|.*\| ([\d.]+) × \|", onnx)[0])
    assert list(said.groups()) == found
