"""Several artifacts side by side: their names, and the front of size, drift and speed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.errors import InputError
from qwen3_export.prove.compare import compare
from qwen3_export.prove.naming import unique_names
from qwen3_export.prove.report.charts import charts
from qwen3_export.prove.report.tables import compare_table
from tests.cli.helpers import call
from tests.unit.prove.reports import OLD, drifts, report, result, speed


def test_names_are_as_long_as_tells_them_apart() -> None:
    assert unique_names(["/a/m.gguf", "/b/m.gguf", "/b/n.gguf"]) == ["a/m.gguf", "b/m.gguf", "n.gguf"]
    assert unique_names(["m", "m", "m/m"]) == ["m", "m (2)", "m/m"]
    assert unique_names(["/x/y/m", "/z/y/m"]) == ["x/y/m", "z/y/m"]
    assert unique_names([]) == []


def write(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(values))
    return folder


def candidate(name: str, size: int, kl: float, pace: float | None) -> dict[str, Any]:
    item = result(drifts(), name, bytes=size, kl_mean=kl)
    return item if pace is None else {**item, **speed(1 / pace, artifact=name)}


def test_the_front_has_what_no_other_beats_in_size_drift_and_speed(tmp_path: Path) -> None:
    made = [
        *(candidate("small", 10, 0.5, 1.0), candidate("good", 30, 0.1, 1.0), candidate("fast", 30, 0.3, 4.0)),
        *(candidate("beaten", 31, 0.3, 3.0), candidate("twin", 30, 0.1, 1.0), candidate("unmeasured", 40, 0.6, None)),
    ]
    found = compare([write(tmp_path / "one", report(*made[:3])), write(tmp_path / "two", report(*made[3:]))])
    assert {c["name"]: c["pareto"] for c in found["candidates"]} == {
        "small": True,
        "good": True,
        "fast": True,
        "beaten": False,
        "twin": True,
        "unmeasured": False,
    }
    assert [c["report"] for c in found["candidates"]] == ["one"] * 3 + ["two"] * 3


def test_only_a_candidate_with_every_figure_beats_another(tmp_path: Path) -> None:
    """Smaller and better, but of unknown speed: it stands on the front beside what was measured in full."""
    measured, unknown = candidate("measured", 30, 0.1, 1.0), candidate("unknown", 10, 0.05, None)
    worse = candidate("worse", 31, 0.2, None)
    for order in ((measured, unknown, worse), (worse, unknown, measured)):
        place = tmp_path / order[0]["artifact"]
        found = compare([write(place, report(*order))])["candidates"]
        assert {c["name"]: c["pareto"] for c in found} == {"measured": True, "unknown": True, "worse": False}


def test_an_estimated_kl_is_marked(tmp_path: Path) -> None:
    estimate = {"lower_bound": 0.1, "stderr": 0.01}
    items = (
        {**candidate("estimated", 10, 0.5, 1.0), "kl_estimate": estimate},
        {**candidate("bound", 20, 0.25, 1.0), "kl_is_lower_bound": True},
        candidate("exact", 30, 0.125, 1.0),
    )
    folder = write(tmp_path / "one", report(*items))
    found = compare([folder])
    rows = {row[0]: row for row in compare_table(found).rows}
    for name, kl in {"estimated": "≈ 0.500000", "bound": "≥ 0.250000", "exact": "0.125000"}.items():
        assert kl in rows[name]
    assert "estimated: 10 B, KL ≈ 0.5, 100.0 tok/s" in "".join(chart.svg for chart in charts(found))
    said = call("inspect", folder)
    assert "≈ 0.50000" in said.out
    assert "≥ 0.25000" in said.out
    assert call("inspect", folder, "--json").json["artifacts"][0]["kl_estimate"] == estimate


def test_drift_and_latency_of_an_artifact_become_one_candidate(tmp_path: Path) -> None:
    drift, pace = report(result(drifts(), "m.gguf")), report(speed(), cpu="y")
    found = compare([write(tmp_path / "drift", drift), write(tmp_path / "pace", pace)])
    (one,) = found["candidates"]
    assert (one["bytes"], one["tokens_per_second"], one["report"]) == (1000, 100.0, "drift, pace")
    assert "different processors" in found["notes"][0]
    again = compare([write(tmp_path / "a", drift), write(tmp_path / "b", drift)])
    assert [c["name"] for c in again["candidates"]] == ["m.gguf (a)", "m.gguf (b)"]
    elsewhere = report(result(drifts(), "../m.gguf"))
    again = compare([write(tmp_path / "c", drift), write(tmp_path / "d", elsewhere)])
    assert [c["name"] for c in again["candidates"]] == ["m.gguf (c)", "m.gguf (d)"]


def test_drift_from_different_originals_is_not_put_side_by_side(tmp_path: Path) -> None:
    other = copy.deepcopy(OLD)
    other["results"][0].update(reference_sha256="other", artifact="other.gguf")
    with pytest.raises(InputError, match=r"other\.gguf: measured against another original"):
        compare([write(tmp_path / "a", OLD), write(tmp_path / "b", other)])
