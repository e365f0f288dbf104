"""The page of GGUF figures and the guide's table are what the program writes from the measured rows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.gguf.report import add, bits_per_weight, write_guide, write_page

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
        r"`gguf-q4_k_m` has ([\d.]+) .*?, ([\d.]+) with outlier .*?; `edge-w4` ([\d.]+) and ([\d.]+) of", readme
    )
    assert said
    kl = {(row["checkpoint"], row["type"], row["way"]): row["kl"] for row in json.loads(RESULTS.read_text())["quality"]}
    found = [
        f"{kl[name, 'q4_k_m', 'ours solved'] / kl[name, 'q4_k_m', 'llama.cpp imatrix']:.2f}"
        for name in ("reference-model", "outliers")
    ]
    onnx = RESULTS.with_name("2026-11-onnx.md").read_text()
    found += re.findall(r"\| edge-w4 \|.*\| ([\d.]+) × builder int4 \|", onnx)
    assert list(said.groups()) == found
