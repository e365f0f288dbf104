"""Limits and a result to a verdict."""

from __future__ import annotations

import math

import pytest

from qwen3_export.prove.gate import check, doubt, explain
from qwen3_export.prove.limits import LIMITS
from tests.unit.prove.reports import RESULT

AT_THE_LIMIT = {
    "max_kl": 0.01,
    "max_kl_p99": 0.2,
    "min_top1": 0.9,
    "max_ppl_ratio": 1.02,
    "max_bytes": 1000.0,
    "max_extra_loops": 1.0,
    "min_expert_tokens": 64.0,
    "max_experts_below_floor": 3.0,
    "max_kl_median": 0.004,
    "max_kl_p999": 0.5,
    "max_kl_max": 0.9,
    "max_delta_p_rms": 0.03,
    "max_changed_sidecars": 0.0,
    "max_flip_share": 0.01,
    "max_right_to_wrong": 2.0,
    "min_decode_tokens_per_second": 20.0,
    "max_first_token_seconds": 0.25,
    "max_peak_memory": 5_000_000.0,
}


def test_every_limit_is_tested_here() -> None:
    assert set(AT_THE_LIMIT) == set(LIMITS)


def test_a_value_at_its_limit_passes() -> None:
    verdict = check(RESULT, AT_THE_LIMIT)
    assert verdict["passed"] is True
    assert [item["passed"] for item in verdict["checks"]] == [True] * len(AT_THE_LIMIT)
    assert verdict["checks"][1] == {"name": "max_kl_p99", "value": 0.2, "limit": 0.2, "passed": True}
    assert verdict["checks"][0] == {
        "name": "max_kl",
        "value": 0.01,
        "limit": 0.01,
        "passed": True,
        "ci95": [0.008, 0.012],
        "conclusive": False,
        "positions": 100,
        "positions_needed": None,
    }


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_a_value_beyond_its_limit_fails_alone(name: str) -> None:
    step = 1e-6 if name.startswith("min") else -1e-6
    verdict = check(RESULT, {**AT_THE_LIMIT, name: AT_THE_LIMIT[name] + step})
    assert verdict["passed"] is False
    assert [item["name"] for item in verdict["checks"] if not item["passed"]] == [name]


@pytest.mark.parametrize(
    ("name", "key"), [("max_kl", "kl_mean"), ("min_top1", "top1_agreement"), ("max_ppl_ratio", "ppl_ratio")]
)
def test_a_value_that_is_nan_fails(name: str, key: str) -> None:
    assert check({**RESULT, key: math.nan}, {name: AT_THE_LIMIT[name]})["passed"] is False


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_a_limit_that_is_nan_fails(name: str) -> None:
    assert check(RESULT, {name: math.nan})["passed"] is False


def test_what_was_not_measured_fails_its_limit() -> None:
    verdict = check({"kl_mean": 0.1}, {"max_first_token_seconds": 1.0, "thinking.max_extra_loops": 9.0})
    assert [item["passed"] for item in verdict["checks"]] == [False, False]
    assert explain(verdict["checks"][0]) == "max_first_token_seconds: the artifact does not have this value"


@pytest.mark.parametrize(
    ("limit", "on", "passed", "conclusive"),
    [
        (0.013, "mean", True, True),
        (0.013, "upper", True, True),
        (0.011, "mean", True, False),
        (0.011, "upper", False, False),
        (0.009, "mean", False, False),
        (0.007, "upper", False, True),
    ],
)
def test_the_mean_or_the_bad_end_of_its_interval_must_hold(
    limit: float, on: str, passed: bool, conclusive: bool
) -> None:
    verdict = check(RESULT, {"max_kl": limit}, on)
    assert verdict["passed"] is passed
    assert verdict["checks"][0]["conclusive"] is conclusive
    assert (doubt(verdict["checks"][0]) is None) is conclusive


def test_the_bad_end_of_a_share_is_the_lower_one() -> None:
    result = {**RESULT, "top1_ci95": [0.88, 0.92]}
    assert check(result, {"min_top1": 0.89}, "mean")["passed"] is True
    assert check(result, {"min_top1": 0.89}, "upper")["passed"] is False
    assert check(result, {"min_top1": 0.87}, "upper")["passed"] is True


def test_so_many_positions_would_decide_it() -> None:
    """At a distance of half the interval's half width, four times the positions are needed."""
    item = check(RESULT, {"max_kl": 0.011})["checks"][0]
    assert item["positions_needed"] == 400
    assert doubt(item) == "max_kl is inconclusive at 100 positions, about 400 would decide it"
    assert explain({**item, "passed": False}).endswith("; inconclusive at 100 positions, about 400 would decide it")
    item = check(RESULT, {"max_kl": 0.01})["checks"][0]
    assert doubt(item) == "max_kl is inconclusive at 100 positions, no number of them would decide it"


def test_no_limits_pass_without_a_check() -> None:
    assert check(RESULT, {}) == {"passed": True, "on": "mean", "checks": []}
