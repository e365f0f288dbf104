"""Two reports in pairs: what is worse, what cannot be told, what may not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.errors import InputError
from qwen3_export.prove.baseline import compare_with_baseline, read_report
from qwen3_export.prove.pair import judge, may_be_worse
from qwen3_export.prove.statistics import SampleDrift
from qwen3_export.prove.tolerance import DEFAULTS, Tolerance, read_tolerance
from tests.unit.prove.reports import OLD, ROWS, TOKENS, drifts, report, result, speed


def verdicts(new: dict[str, Any], old: dict[str, Any], strict: bool = False, **tolerances: Tolerance) -> dict[str, str]:
    found = compare_with_baseline(new, old, {**DEFAULTS, **tolerances}, strict)
    return {item["metric"]: item["verdict"] for item in found["pairs"]}


NO_TOLERANCE = Tolerance()


def test_a_report_is_the_same_as_itself() -> None:
    found = compare_with_baseline(OLD, OLD, DEFAULTS)
    assert (found["verdict"], found["passed"]) == ("same", True)
    assert [item["metric"] for item in found["pairs"]] == ["kl_mean", "top1_agreement", "ppl_ratio", "bytes"]
    for item in found["pairs"]:
        assert item["delta"] == 0
        assert item["ci95"] == [0, 0]


@pytest.mark.parametrize(("scale", "verdict"), [(1.5, "worse"), (1.01, "same"), (0.5, "better")])
def test_a_change_in_every_row_is_found(scale: float, verdict: str) -> None:
    found = compare_with_baseline(report(result(drifts(scale, seed=1))), OLD, DEFAULTS)
    kl = found["pairs"][0]
    assert kl["verdict"] == found["verdict"] == verdict
    assert found["passed"] is (verdict != "worse")
    assert kl["ci95"][0] <= kl["delta"] <= kl["ci95"][1]
    assert kl["value"] - kl["baseline"] == pytest.approx(kl["delta"])


def test_pairs_find_what_two_intervals_apart_do_not() -> None:
    """A tenth more KL in every row lies within both intervals, and is certain all the same."""
    old, new = OLD["results"][0], result(drifts(1.1, seed=1))
    assert old["kl_ci95"][0] < new["kl_mean"] < old["kl_ci95"][1]
    assert verdicts(report(new), OLD)["kl_mean"] == "worse"


def test_the_interval_is_that_of_the_row_differences() -> None:
    new = drifts(1.0, seed=3, shift=0.002)
    found = compare_with_baseline(report(result(new)), OLD, DEFAULTS)["pairs"][0]
    differences = np.array([a.kl.mean() - b.kl.mean() for a, b in zip(new, drifts(), strict=True)])
    assert found["delta"] == pytest.approx(differences.mean())
    width = 2 * 1.96 * differences.std() / np.sqrt(ROWS)
    assert found["ci95"][1] - found["ci95"][0] == pytest.approx(width, rel=0.25)


def test_a_worse_mean_inside_its_interval_fails_only_when_strict() -> None:
    new = drifts()
    worse = np.where(np.arange(ROWS) % 8 == 0, 1.6, 0.97)
    new = [
        SampleDrift(d.kl * w, d.same_top, d.reference_logprob, d.artifact_logprob)
        for d, w in zip(new, worse, strict=True)
    ]
    item = result(new)
    assert item["kl_mean"] > OLD["results"][0]["kl_mean"]
    lax = compare_with_baseline(report(item), OLD, {**DEFAULTS, "kl_mean": NO_TOLERANCE})
    assert lax["pairs"][0]["ci95"][0] < 0 < lax["pairs"][0]["delta"]
    assert (lax["pairs"][0]["verdict"], lax["verdict"], lax["passed"]) == ("inconclusive", "inconclusive", True)
    strict = compare_with_baseline(report(item), OLD, {**DEFAULTS, "kl_mean": NO_TOLERANCE}, strict=True)
    assert (strict["pairs"][0]["verdict"], strict["passed"], strict["strict"]) == ("worse", False, True)


@pytest.mark.parametrize(
    ("delta", "low", "high", "allowed", "verdict", "strictly"),
    [
        (3, 2, 4, 1, "worse", "worse"),
        (1.5, 0.5, 2.5, 1, "inconclusive", "worse"),
        (0.9, 0.5, 2.5, 1, "inconclusive", "inconclusive"),
        (0.5, 0.1, 0.9, 1, "same", "same"),
        (-0.5, -0.9, -0.1, 1, "same", "same"),
        (-3, -4, -2, 1, "better", "better"),
        (-0.9, -1.5, -0.3, 1, "better", "better"),
        (-0.5, -2, 1.5, 1, "inconclusive", "inconclusive"),
        (0, 0, 0, 0, "same", "same"),
        (1, 1, 1, 0, "worse", "worse"),
    ],
)
def test_verdicts(delta: float, low: float, high: float, allowed: float, verdict: str, strictly: str) -> None:
    assert judge(delta, low, high, allowed, strict=False) == verdict
    assert judge(delta, low, high, allowed, strict=True) == strictly


def test_fewer_equal_top_tokens_are_worse() -> None:
    new = [
        SampleDrift(d.kl, d.same_top & (np.arange(TOKENS) % 10 > 0), d.reference_logprob, d.artifact_logprob)
        for d in drifts()
    ]
    assert verdicts(report(result(new)), OLD)["top1_agreement"] == "worse"
    assert verdicts(OLD, report(result(new)))["top1_agreement"] == "better"


def test_size_and_tolerances(tmp_path: Path) -> None:
    new = report(result(drifts(), bytes=1100))
    assert verdicts(new, OLD)["bytes"] == "worse"
    file = tmp_path / "tolerance.yaml"
    file.write_text("bytes: 1kB\nkl_mean: 20%\ndomains: {math: {kl_mean: 0.5}}\nlatency: 30 %\n")
    tolerances = read_tolerance(file)
    assert tolerances["bytes"] == Tolerance(absolute=1000)
    assert tolerances["kl_mean"] == Tolerance(relative=0.2)
    assert tolerances["latency"] == Tolerance(relative=0.3)
    assert tolerances["ppl_ratio"] == DEFAULTS["ppl_ratio"]
    found = verdicts(new, OLD, **tolerances)
    assert (found["bytes"], found["domains.math.kl_mean"]) == ("same", "same")
    with pytest.raises(InputError, match=r"domains\.law\.kl_mean: the text has no domain 'law'"):
        verdicts(new, OLD, **{"domains.law.kl_mean": NO_TOLERANCE})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "5", "kl: 1", "kl_mean: -1", "kl_mean: high", "kl_mean: true", "kl_mean: .nan", "bytes: 3 apples"),
        *("domains: {math: 3}", "domains: {math: {bytes: 3}}", "prefill.p50: 3", "{", "decode.p99: 1"),
    ],
)
def test_a_tolerance_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "tolerance.yaml").write_text(text)
    with pytest.raises(InputError, match=r"tolerance\.yaml"):
        read_tolerance(tmp_path / "tolerance.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference_sha256": "other"}, "the original differs"),
        ({"text_sha256": "other"}, "the text differs"),
        ({"runtime": "onnxruntime"}, "the runtime differs: onnxruntime, baseline llama.cpp"),
        ({"device": "cuda"}, "the device differs"),
        ({"kl_is_lower_bound": True}, "the kind of reference"),
        ({"settings": {"exact": True, "threads": 1}}, "exact mode differs"),
    ],
)
def test_pairs_that_are_none_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        verdicts(report(result(drifts(), **changes)), OLD)


def test_other_threads_do_not_matter_for_drift() -> None:
    assert verdicts(report(result(drifts(), settings={"exact": False, "threads": 8})), OLD)["kl_mean"] == "same"


def test_a_report_without_row_sums_or_with_others_is_refused() -> None:
    item = result(drifts())
    del item["rows"]
    with pytest.raises(InputError, match="no sums of its rows"):
        verdicts(report(item), OLD)
    with pytest.raises(InputError, match="the rows of both reports are not the same"):
        verdicts(report(result(drifts(rows=30))), OLD)
    damaged = result(drifts())
    for sums in (None, [float("nan")] * len(damaged["rows"]["kl"])):
        damaged["rows"] = {**damaged["rows"], "kl": sums}
        with pytest.raises(InputError, match="damaged report"):
            verdicts(report(damaged), OLD)
        damaged = result(drifts())


def test_a_smaller_agreement_may_be_worse() -> None:
    item = {"metric": "domains.math.top1_agreement", "verdict": "inconclusive", "delta": -0.1, "allowed": 0.05}
    assert may_be_worse(item)
    assert not may_be_worse({**item, "delta": 0.1})
    assert not may_be_worse({**item, "verdict": "same"})


@pytest.mark.parametrize("field", ["bytes", "peak_rss_bytes", "kl_mean", "decode"])
def test_what_the_baseline_has_must_be_measured_again(field: str) -> None:
    both = {**speed(), **result(drifts())}
    less = {key: value for key, value in both.items() if key != field}
    with pytest.raises(InputError, match=r"the baseline has .*, the report has not"):
        compare_with_baseline(report(less), report(both), DEFAULTS)
    if field != "peak_rss_bytes":
        assert len(compare_with_baseline(report(both), report(less), DEFAULTS)["unpaired"]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_figure_that_is_no_number_passes(value: float) -> None:
    odd = speed(decode={**speed()["decode"], "per_token_seconds_p50": value})
    with pytest.raises(InputError, match=r"damaged report .*decode\.p50 is no finite number"):
        compare_with_baseline(report(odd), report(speed()), DEFAULTS)


def test_artifacts_are_paired_by_name() -> None:
    a, b = result(drifts(), "/old/a.gguf"), result(drifts(2.0), "/old/b.gguf")
    new = [{**b, "artifact": "/new/b.gguf"}, {**a, "artifact": "/new/a.gguf"}, result(drifts(), "/new/c.gguf")]
    found = compare_with_baseline(report(*new), report(a, b), DEFAULTS)
    assert (found["verdict"], found["unpaired"]) == ("same", ["c.gguf"])
    with pytest.raises(InputError, match=r"c\.gguf: the baseline has it, the report has not"):
        compare_with_baseline(report(a, b), report(*new), DEFAULTS)
    alone = compare_with_baseline(report(result(drifts(), "renamed.gguf")), OLD, DEFAULTS)
    assert {item["artifact"] for item in alone["pairs"]} == {"renamed.gguf"}


def test_latency_is_judged_relative_to_its_scatter() -> None:
    slower = report(speed(1.3))
    found = verdicts(slower, report(speed()))
    assert found == {
        "prefill.128.p50": "worse",
        "prefill.128.p95": "worse",
        "decode.p50": "worse",
        "decode.p95": "worse",
        "peak_rss_bytes": "same",
    }
    noisy = verdicts(report(speed(1.3, spread=0.5)), report(speed(spread=0.5)))
    assert noisy["decode.p50"] == noisy["prefill.128.p95"] == "inconclusive"
    recorded = [speed(f, decode={**speed(f)["decode"], "scatter": 0.3}) for f in (1.3, 1.0)]
    assert verdicts(report(recorded[0]), report(recorded[1]))["decode.p50"] == "inconclusive"
    assert verdicts(report(speed(0.5)), report(speed()))["decode.p50"] == "better"
    assert verdicts(slower, report(speed()), **{"decode.p50": Tolerance(relative=0.6)})["decode.p50"] == "same"
    assert verdicts(slower, report(speed()), load_seconds=Tolerance())["load_seconds"] == "worse"


def test_latency_of_another_processor_is_inconclusive() -> None:
    found = compare_with_baseline(report(speed(3.0), cpu="y"), report(speed()), DEFAULTS)
    assert found["verdict"] == "inconclusive"
    assert found["pairs"][0]["reason"] == "measured on another processor: y, baseline x"
    strict = compare_with_baseline(report(speed(3.0), cpu="y"), report(speed()), DEFAULTS, strict=True)
    assert (strict["verdict"], strict["passed"]) == ("worse", False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads": 2}, "the number of threads differs"),
        ({"runtime": "onnxruntime"}, "the runtime differs"),
        ({"prefill": []}, "the prompt lengths differs"),
    ],
)
def test_latency_with_other_settings_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        verdicts(report(speed(**changes)), report(speed()))


def test_a_measurement_that_the_baseline_has_must_be_there() -> None:
    both = {**result(drifts()), **speed(artifact="/a/model.gguf")}
    assert set(verdicts(report(both), report(both))) > {"kl_mean", "decode.p50"}
    assert "decode.p50" not in verdicts(report(both), OLD)
    with pytest.raises(InputError, match="the baseline has its latency"):
        verdicts(OLD, report(both))
    with pytest.raises(InputError, match="the baseline has its drift"):
        verdicts(report(speed()), report(both))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": []}', '{"results": [3]}', '{"results": [{}]}', "nan"])
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(tmp_path)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *((("failed", value, "no list of artifacts")) for value in (3, "m.gguf", [3], [{}], [{"artifact": "m.gguf"}])),
        *((("environment", value, "no object")) for value in (None, "x86", [])),
    ],
)
def test_a_report_of_another_form_is_refused(tmp_path: Path, field: str, value: Any, words: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**OLD, field: value}))
    with pytest.raises(InputError, match=words):
        read_report(tmp_path)


def test_a_report_of_before_unmeasured_artifacts_is_read(tmp_path: Path) -> None:
    for known in ({}, {"failed": None}, {"failed": []}):
        (tmp_path / "report.json").write_text(json.dumps({**OLD, **known}))
        assert compare_with_baseline(read_report(tmp_path), OLD, DEFAULTS)["verdict"] == "same"
