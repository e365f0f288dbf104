"""Limits to a verdict, and a result to the files of a report."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.coverage import UNKNOWN, read_coverage
from qwen3_export.core.manifest import read_manifest, write_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError
from qwen3_export.prove.gate import check, doubt, explain
from qwen3_export.prove.limits import (
    LIMITS,
    parse_limit,
    read_limits,
    refuse_unmeasurable,
    refuse_without_experts,
)
from qwen3_export.prove.report import junit, markdown, write_report
from qwen3_export.prove.tolerance import Tolerance, read_tolerance
from qwen3_export.prove.validate import open_reference, validate
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

RESULT: dict[str, Any] = {
    "artifact": "/some/where/model.gguf",
    "runtime": "llama.cpp",
    "runtime_version": "b1",
    "device": "cpu",
    "tokens": 100,
    "kl_mean": 0.01,
    "kl_ci95": [0.008, 0.012],
    "kl_p99": 0.2,
    "top1_agreement": 0.9,
    "ppl_reference": 15.0,
    "ppl_artifact": 15.3,
    "ppl_ratio": 1.02,
    "domains": {"code": {"tokens": 60, "kl_mean": 0.02, "top1_agreement": 0.8, "ppl_ratio": 1.1}},
    "generation": {"texts": 8, "agreement": 0.5, "loops": 3, "loops_reference": 2, "extra_loops": 1},
    "bytes": 1000,
    "statistics": {"kl": {"median": 0.004, "p99_9": 0.5, "max": 0.9}, "probability_change": {"rms": 0.03}},
    "sidecars": {"changed": 0},
    "flips": {"sure_from": 0.9, "sure_positions": 50, "flips": 1, "share": 0.01},
    "tasks": {"tasks": 60, "right_to_wrong": 2},
    "decode": {"tokens_per_second_p50": 20.0},
    "first_token": {"seconds_p50": 0.25},
    "peak_rss_bytes": 5_000_000,
    "experts": {"min_tokens": 64, "below_floor": 3, "floor": 128, "fallback": "share"},
}
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


def judged(limits: dict[str, float], **changes: Any) -> dict[str, Any]:
    result = {**{key: value for key, value in RESULT.items() if key not in ("decode", "tasks", "flips")}, **changes}
    return {**result, "gate": check(result, limits)}


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


@pytest.mark.parametrize("name", ["min_expert_tokens", "max_experts_below_floor"])
def test_a_limit_on_experts_of_which_nothing_is_known_fails_and_says_so(name: str) -> None:
    verdict = check({**RESULT, "experts": UNKNOWN}, {name: 0.0})
    assert verdict["passed"] is False
    assert explain(verdict["checks"][0]).startswith(f"{name}: the artifact does not say")
    suite = ElementTree.fromstring(junit({"results": [{**RESULT, "gate": verdict}]}))
    failure = suite[0].find("failure")
    assert failure is not None
    assert "does not say how many tokens" in str(failure.get("message"))


@pytest.mark.parametrize("name", ["min_expert_tokens", "max_experts_below_floor"])
def test_a_limit_on_experts_is_refused_for_a_dense_model(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: a/model is a dense model"):
        refuse_without_experts({name: 1.0, "max_kl": 1.0}, Path("a/model"), None)
    refuse_without_experts({"max_kl": 1.0}, Path("a/model"), None)
    refuse_without_experts({name: 1.0}, Path("a/model"), UNKNOWN)


def test_coverage_is_read_from_the_manifest_or_else_the_configuration_says_if_there_are_experts(tmp_path: Path) -> None:
    def folder(name: str, config: dict[str, Any] | None, **manifest: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        if config:
            (path / "config.json").write_text(json.dumps(config))
        if manifest:
            write_manifest(path, "test", manifest)
        return path

    summary = {"min_tokens": 3, "below_floor": 1, "floor": 4, "fallback": "rtn"}
    counted = {**summary, "tokens_per_expert": {"model.layers.0": [3, 9]}}
    assert read_coverage(folder("quantized", tiny_moe_config(), experts=counted)) == summary
    assert read_coverage(folder("exported", None, experts=summary)) == summary
    assert read_coverage(folder("dense", tiny_config(), experts=None)) is None
    assert read_coverage(folder("dense source", tiny_config())) is None
    assert read_coverage(folder("source", tiny_moe_config())) == UNKNOWN
    assert read_coverage(folder("all layers dense", tiny_moe_config(mlp_only_layers=[0, 1]))) is None
    assert read_coverage(folder("old export", None, flavor="ort")) == UNKNOWN
    assert read_coverage(folder("older", None, experts={"min_tokens": 3})) == {**UNKNOWN, "min_tokens": 3}


@pytest.mark.slow
def test_a_starved_export_fails_its_gate_in_its_own_runtime(tmp_path: Path, reference_folder: Path) -> None:
    """From the quantized folder and from the GGUF file, which carries the summary along."""
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "max_position_embeddings": 512,
    }
    source = write_checkpoint(tmp_path / "moe", tiny_moe_config(**sizes))
    for path in reference_folder.glob("*token*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    recipe = Recipe.from_dict(
        {"name": "test", "method": "gptq", "rules": [{"match": "*", "scheme": {"group_size": 32}}]}, "test"
    )
    folder, file = tmp_path / "quantized", tmp_path / "model.gguf"
    experts = quantize(open_checkpoint(source), recipe, folder, QuantizeSettings(samples=2, sequence_length=64))[
        "experts"
    ]
    assert 0 < experts["min_tokens"] < experts["floor"] == 128
    export_gguf(open_checkpoint(folder), file)
    export_gguf(open_checkpoint(source), tmp_path / "plain.gguf", "bf16")
    reference = open_reference(str(source), tokens=64)
    limits = {"min_expert_tokens": 128.0, "max_experts_below_floor": 8.0}
    results = validate([folder, file], reference, limits)["results"]
    for result in results:
        assert result["experts"] == experts
        assert [item["passed"] for item in result["gate"]["checks"]] == [False, True]
    recorded = json.loads((folder / "qwen3-export.json").read_text())["tensors"]
    found = results[0]["rounding_errors"]
    assert found["q_proj"]["1"] == recorded["model.layers.1.self_attn.q_proj"]["error"]
    experts = [recorded[f"model.layers.0.mlp.experts.{i}.up_proj"]["error"] for i in range(4)]
    assert found["up_proj"]["0"] == pytest.approx(sum(experts) / 4)
    assert results[1]["rounding_errors"] is None
    unknown = validate([source, tmp_path / "plain.gguf"], reference, limits)["results"]
    assert all(item["value"] is None and not item["passed"] for one in unknown for item in one["gate"]["checks"])
    with pytest.raises(InputError, match="is a dense model"):
        validate([reference_folder], open_reference("reference-model", tokens=64), limits)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("min_top1", 92, "lies between 0 and 1"),
        ("min_top1", -0.1, "lies between 0 and 1"),
        ("max_kl", -1, "never below 0"),
        ("max_kl", math.nan, "a finite number"),
        ("max_kl", math.inf, "a finite number"),
        ("max_ppl_ratio", 0, "always above 0"),
        ("max_bytes", 0, "always above 0"),
        ("domains.math.min_top1", 2, "lies between 0 and 1"),
        ("thinking.min_agreement", 1.5, "lies between 0 and 1"),
        ("min_decode_tokens_per_second", -3, "always above 0"),
        ("max_extra_loops", -1, "never below 0"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_the_reason(
    name: str, value: float, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{name}: .* cannot be a limit: .*{reason}"):
        parse_limit(name, value)
    *sections, last = name.split(".")
    for section in reversed([*sections, last]):
        value = {section: value}  # type: ignore[assignment]
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(InputError, match=r"gate\.yaml: .* cannot be a limit"):
        read_limits(tmp_path / "gate.yaml")


def test_a_percentage_in_place_of_a_share_is_guessed() -> None:
    with pytest.raises(InputError) as caught:
        parse_limit("min_top1", 92)
    assert caught.value.hint == "0.92 for 92 %"


@pytest.mark.parametrize(
    ("text", "count"), [("9MB", 9e6), ("9 MiB", 9 * 2**20), ("1.5GB", 1.5e9), ("800kB", 8e5), ("'12'", 12), ("12", 12)]
)
def test_sizes_are_written_as_people_do(text: str, count: float, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(f"max_bytes: {text}\nmax_peak_memory: {text}\n")
    assert read_limits(tmp_path / "gate.yaml") == {"max_bytes": count, "max_peak_memory": count}


def test_powers_of_ten_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML takes `1e-3` for a text."""
    (tmp_path / "gate.yaml").write_text("max_kl: 1e-3\nmax_bytes: 1e9\n")
    assert read_limits(tmp_path / "gate.yaml") == {"max_kl": 0.001, "max_bytes": 1e9}
    (tmp_path / "tolerance.yaml").write_text("kl_mean: 1e-3\nbytes: 1e3\n")
    found = read_tolerance(tmp_path / "tolerance.yaml")
    assert (found["kl_mean"], found["bytes"]) == (Tolerance(absolute=0.001), Tolerance(absolute=1000))


def test_limits_of_a_domain_and_of_thinking(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(
        "max_kl: 1\ndomains:\n  code: {max_kl: 0.01, min_top1: 0.8}\n  v1.2: {max_ppl_ratio: 2}\n"
        "thinking: {max_extra_loops: 0}\nno_thinking: {min_agreement: 0.5}\n"
    )
    limits = read_limits(tmp_path / "gate.yaml")
    assert list(limits) == [
        *("max_kl", "domains.code.max_kl", "domains.code.min_top1", "domains.v1.2.max_ppl_ratio"),
        *("thinking.max_extra_loops", "no_thinking.min_agreement"),
    ]
    domains = {**RESULT["domains"], "v1.2": {"tokens": 4, "ppl_ratio": 1.5}}
    modes = {"thinking": {"extra_loops": 1, "agreement": 1}, "no_thinking": {"extra_loops": 0, "agreement": 0.5}}
    result = {**RESULT, "domains": domains, "generation": {**RESULT["generation"], **modes}}
    verdict = check(result, limits)
    assert [item["passed"] for item in verdict["checks"]] == [True, False, True, True, False, True]
    assert [item["value"] for item in verdict["checks"]] == [0.01, 0.02, 0.8, 1.5, 1, 0.5]
    refuse_unmeasurable(limits, ("code", "v1.2"), {})
    with pytest.raises(InputError, match=r"domains\.code\.max_kl: the reference's text has no domain 'code'"):
        refuse_unmeasurable(limits, ("prose", "v1.2"), {})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("max_right_to_wrong", "tasks"),
        ("max_changed_sidecars", "sidecars"),
        ("thinking.max_extra_loops", "thinking"),
        ("no_thinking.min_agreement", "no_thinking"),
    ],
)
def test_a_limit_on_what_is_not_measured_is_refused(name: str, part: str) -> None:
    with pytest.raises(InputError, match=f"{name}: there are no {part} to be compared with"):
        refuse_unmeasurable({"max_kl": 1.0, name: 1.0}, (), {part: False})
    refuse_unmeasurable({"max_kl": 1.0, name: 1.0}, (), {part: True})


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


@pytest.mark.parametrize("text", ["max_kl: 0.02\nmin_top1: 1\n", '{"max_kl": 0.02, "min_top1": 1}'])
def test_a_gate_file_is_yaml_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    limits = read_limits(tmp_path / "gate.yaml")
    assert limits == {"max_kl": 0.02, "min_top1": 1.0}
    assert all(type(value) is float for value in limits.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "0.02",
        "max_lk: 0.02",
        "domains: {math: {max_lk: 1}}",
        "domains: {math: 3}",
        "domains: {max_kl: 3}",
        "thinking: {math: {max_extra_loops: 3}}",
        "thinking: {max_kl: 3}",
        "max_bytes: 9 metres",
        "max_kl: high",
        "max_kl: true",
        "max_kl: [0.1]",
        "max_kl:",
        "3: 4",
        "max_kl: {",
        "when: 2024-99-99",
        "[" * 1000,
    ],
    ids=lambda text: text[:20],
)
def test_a_gate_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(InputError, match=r"gate\.yaml"):
        read_limits(tmp_path / "gate.yaml")


def test_an_unknown_limit_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("max_lk: 0.02")
    with pytest.raises(InputError, match=r"max_lk: 0\.02 is no limit") as caught:
        read_limits(tmp_path / "gate.yaml")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in LIMITS)


def test_a_missing_gate_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gate\.yaml: cannot be read"):
        read_limits(tmp_path / "gate.yaml")


TWO = {
    "results": [
        judged({"max_kl": 0.02, "min_top1": 0.95}, seconds=1.5),
        judged({"max_kl": 0.001}, artifact="a & <b>.onnx"),
    ],
    "passed": False,
}


def test_junit_has_one_case_per_check_and_one_failure_per_failed_check() -> None:
    suite = ElementTree.fromstring(junit(TWO))
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "3", "2")
    facts = [{p.get("name"): p.get("value") for p in case.iter("property")} for case in suite]
    assert facts[0] == {"value": "0.01", "limit": "0.02"}
    assert [case.get("time") for case in suite] == ["0.750", "0.750", "0.000"]
    assert suite.get("time") == "1.500"
    cases = [(case.get("classname"), case.get("name"), case.find("failure") is None) for case in suite]
    assert cases == [
        ("model.gguf", "max_kl", True),
        ("model.gguf", "min_top1", False),
        ("a & <b>.onnx", "max_kl", False),
    ]
    failure = suite[1].find("failure")
    assert failure is not None
    assert failure.get("message") == "min_top1 is 0.9, the limit is 0.95"


def test_junit_of_an_artifact_without_limits_is_one_case_that_passes() -> None:
    suite = ElementTree.fromstring(junit({"results": [judged({}), {"artifact": "b", "decode": {}}]}))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    assert [prop.get("value") for prop in suite.iter("property")] == ["-", "-"]


def test_the_report_folder_holds_the_result_for_machines_people_and_ci(tmp_path: Path) -> None:
    write_report(tmp_path / "report", TWO, title="Drift of two")
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.json", "report.md", "report.xml"}
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == TWO
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == markdown(TWO, "Drift of two")
    assert ElementTree.parse(tmp_path / "report" / "report.xml").getroot().get("tests") == "3"
    assert read_manifest(tmp_path / "report")["kind"] == "report"


def test_the_markdown_tables_have_a_row_per_artifact_and_domain() -> None:
    lines = markdown(TWO, "Drift").splitlines()
    assert lines[0] == "# Drift"
    assert lines[2] == "**FAIL**"
    assert lines[4] == "- model.gguf: min_top1 is 0.9, the limit is 0.95"
    rows = [line for line in lines if line.startswith("| model.gguf | llama.cpp")]
    assert len(rows) == 1
    assert "| model.gguf | max_kl | 0.01 | 0.008000 … 0.012000 | 0.02 | pass |" in lines
    assert "0.010000" in rows[0]
    assert rows[0].endswith("| FAIL |")
    assert sum(line.startswith("| code | 60 | 0.020000 | - | 0.8000 | 1.1000 |") for line in lines) == 2
    for table in "\n".join(lines).split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_an_existing_report_is_kept_unless_it_is_ours_and_forced(tmp_path: Path) -> None:
    write_report(tmp_path / "report", TWO)
    with pytest.raises(InputError, match="exists already"):
        write_report(tmp_path / "report", {"results": []})
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == TWO
    write_report(tmp_path / "report", {"results": []}, force=True)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == {"results": []}
