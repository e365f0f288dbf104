"""What is predicted of building TensorRT plans, beside every build in benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_export.ship.tensorrt.cost import build_cost

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-tensorrt.md"
# By the first word of a row: vocabulary, width and layers, unless the row says how many.
MODELS = {"0.6B": (151936, 1024, 28), "60": (151936, 1024, 60), "reference": (8192, 256, 6)}
NARROW_VOCABULARY, NARROW_WIDTH, KV_WIDTH, HEADS_WIDTH, INNER = 8192, 64, 64, 128, 96


def tables() -> list[list[list[str]]]:
    """Rows of the two tables of builds."""
    text = RESULTS.read_text().split("## What building takes")[1].split("## ")[0]
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("| \n").split("|")] for line in b.splitlines()[2:]] for b in blocks]


def builds() -> Iterator[tuple[str, tuple[int, int, int, int, int], float, float | None]]:
    """Name, arguments of `build_cost`, measured peak in MB, measured processor seconds."""
    whole, narrow = tables()
    name = ""
    for row in whole:
        name = name if row[0] == "the same" else row[0]
        vocabulary, width, layers = MODELS[name.split(" ")[0]]
        layers = int(found[1]) if (found := re.search(r", (\d+) layers", name)) else layers
        outer = 2 * vocabulary * width
        rest, is_plain = int(float(row[1]) * 1e6) - outer, "fp16" in name
        sizes = (outer, rest if is_plain else 0, 0 if is_plain else rest, int(row[2]), layers)
        yield f"{name}, {row[2]}", sizes, float(row[3]), float(row[4]) if row[4] else None
    for layers, *figures in ([float(cell) for cell in row] for row in narrow):
        weights = NARROW_WIDTH * (2 * HEADS_WIDTH + 2 * KV_WIDTH + 3 * INNER)
        outer = 2 * NARROW_VOCABULARY * NARROW_WIDTH
        plain, coded = int(2 * weights * layers), int(weights * layers * (4 + 16 / 32) / 8)
        yield f"{layers:.0f} narrow, fp16", (outer, plain, 0, 1, int(layers)), figures[1], figures[0]
        yield f"{layers:.0f} narrow, int4", (outer, 0, coded, 2, int(layers)), figures[3], figures[2]


BUILDS = list(builds())


def test_both_tables_are_read() -> None:
    assert len(BUILDS) == 17
    assert sum(seconds is not None for *_, seconds in BUILDS) == 14


@pytest.mark.parametrize(("sizes", "peak", "seconds"), [b[1:] for b in BUILDS], ids=[b[0] for b in BUILDS])
def test_prediction_fits_what_was_measured(
    sizes: tuple[int, int, int, int, int], peak: float, seconds: float | None
) -> None:
    found = build_cost(*sizes)
    assert found.peak_rss_bytes / 1e6 == pytest.approx(peak, rel=0.12)
    if seconds is not None:
        assert found.seconds == pytest.approx(seconds, rel=0.25)
