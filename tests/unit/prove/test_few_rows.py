"""Baselines of few rows: Student's interval decides what it can, and one row nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.prove.baseline import DRIFT, _paired, compare_with_baseline
from qwen3_export.prove.pair import may_be_worse
from qwen3_export.prove.tolerance import DEFAULTS, Tolerance
from tests.cli.helpers import call
from tests.unit.prove.reports import drifts, report, result
from tests.unit.prove.test_baseline import verdicts


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_few_rows_find_a_model_that_is_many_times_worse(rows: int) -> None:
    old = report(result(drifts(rows=rows)))
    found = compare_with_baseline(report(result(drifts(2.0, rows=rows, shift=1.0))), old, DEFAULTS)["pairs"][0]
    assert (found["verdict"], found["reason"]) == ("worse", None)
    assert verdicts(old, old)["kl_mean"] == "same"


def test_few_rows_of_different_hardness_decide_only_when_strict() -> None:
    """Rows differ a hundredfold, so that twice the KL in three of them is no proof."""
    old, new = report(result(drifts(rows=3))), report(result(drifts(2.0, rows=3)))
    assert verdicts(new, old)["kl_mean"] == "inconclusive"
    assert verdicts(new, old, strict=True)["kl_mean"] == "worse"


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_the_interval_of_few_rows_holds_the_difference_in_19_cases_of_20(rows: int) -> None:
    random, held = np.random.default_rng(5), dict.fromkeys(DRIFT, 0)
    counts = np.array([100, 60, 80, 120][:rows])
    trials = 2000
    for _ in range(trials):
        noise = random.standard_normal(rows) * np.sqrt(counts) * 0.05
        new, old = ({"kl": sums, "same_top": sums, "reference_logprob": sums, "artifact_logprob": 0 * sums}
                    for sums in (0.02 * counts + noise, 0.01 * counts))  # fmt: skip
        for name in held:
            items = [{"rows": {**values, "positions": counts}} for values in (new, old)]
            pair = _paired(name, *items, np.ones(rows, bool), Tolerance(), strict=False)
            right = np.exp(0.02) - np.exp(0.01) if name == "ppl_ratio" else 0.01
            held[name] += pair["ci95"][0] <= right <= pair["ci95"][1]
    for count in held.values():
        assert 0.93 < count / trials < 0.985


def test_one_row_decides_only_when_strict() -> None:
    old, new = report(result(drifts(rows=1))), report(result(drifts(2.0, rows=1)))
    found = compare_with_baseline(new, old, DEFAULTS)
    assert (found["pairs"][0]["verdict"], found["passed"]) == ("inconclusive", True)
    assert found["pairs"][0]["reason"] == "one row is too few for an interval"
    assert [item["metric"] for item in found["pairs"] if may_be_worse(item)] == ["kl_mean"]
    strict = compare_with_baseline(new, old, DEFAULTS, strict=True)
    assert (strict["pairs"][0]["verdict"], strict["passed"]) == ("worse", False)
    better = compare_with_baseline(old, new, DEFAULTS, strict=True)
    assert (better["pairs"][0]["verdict"], better["passed"]) == ("inconclusive", True)
    assert not any(map(may_be_worse, better["pairs"]))
    assert verdicts(old, old)["kl_mean"] == "same"


def test_the_command_warns_of_what_only_strict_refuses(tmp_path: Path) -> None:
    for name, scale in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report(result(drifts(scale, rows=1)))))
    asked = ("gate", tmp_path / "new", "--baseline", tmp_path / "old")
    lax = call(*asked, "--json")
    assert (lax.code, lax.json["verdict"]) == (0, "inconclusive")
    assert "warning: model.gguf: kl_mean went from " in lax.err
    assert "one row is too few for an interval" in call(*asked).out
    strict = call(*asked, "--strict", "--json")
    assert (strict.code, strict.json["verdict"]) == (1, "worse")
