"""Limits to a verdict, and a result to the files of a report."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.coverage import UNKNOWN, read_coverage
from qwen3_export.core.manifest import read_manifest, write_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError
from qwen3_export.prove.gate import LIMITS, check, explain, read_limits, refuse_without_experts
from qwen3_export.prove.report import junit, markdown, write_report
from qwen3_export.prove.validate import open_reference, validate
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.solve.job import Settings
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
}


def judged(limits: dict[str, float], **changes: Any) -> dict[str, Any]:
    result = {**RESULT, **changes}
    return {**result, "gate": check(result, limits)}


def test_every_limit_is_tested_here() -> None:
    assert set(AT_THE_LIMIT) == set(LIMITS)


def test_a_value_at_its_limit_passes() -> None:
    verdict = check(RESULT, AT_THE_LIMIT)
    assert verdict["passed"] is True
    assert [item["passed"] for item in verdict["checks"]] == [True] * len(AT_THE_LIMIT)
    assert verdict["checks"][0] == {"name": "max_kl", "value": 0.01, "limit": 0.01, "passed": True}


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
    experts = quantize(open_checkpoint(source), recipe, folder, Settings(samples=2, sequence_length=64))["experts"]
    assert 0 < experts["min_tokens"] < experts["floor"] == 128
    export_gguf(open_checkpoint(folder), file)
    export_gguf(open_checkpoint(source), tmp_path / "plain.gguf", "bf16")
    reference = open_reference(str(source), tokens=64)
    limits = {"min_expert_tokens": 128.0, "max_experts_below_floor": 8.0}
    results = validate([folder, file], reference, limits)["results"]
    for result in results:
        assert result["experts"] == experts
        assert [item["passed"] for item in result["gate"]["checks"]] == [False, True]
    unknown = validate([source, tmp_path / "plain.gguf"], reference, limits)["results"]
    assert all(item["value"] is None and not item["passed"] for one in unknown for item in one["gate"]["checks"])
    with pytest.raises(InputError, match="is a dense model"):
        validate([reference_folder], open_reference("reference-model", tokens=64), limits)


def test_no_limits_pass_without_a_check() -> None:
    assert check(RESULT, {}) == {"passed": True, "checks": []}


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
    with pytest.raises(InputError, match=r"gate\.yaml: not a readable gate file"):
        read_limits(tmp_path / "gate.yaml")


TWO = {
    "results": [judged({"max_kl": 0.02, "min_top1": 0.95}), judged({"max_kl": 0.001}, artifact="a & <b>.onnx")],
    "passed": False,
}


def test_junit_has_one_case_per_check_and_one_failure_per_failed_check() -> None:
    suite = ElementTree.fromstring(junit(TWO))
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "3", "2")
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
    rows = [line for line in lines if line.startswith("| model.gguf |")]
    assert len(rows) == 1
    assert "0.010000" in rows[0]
    assert rows[0].endswith("| FAIL |")
    assert sum(line.startswith("| code | 60 | 0.020000 | 0.8000 | 1.1000 |") for line in lines) == 2
    for table in "\n".join(lines).split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_an_existing_report_is_kept_unless_it_is_ours_and_forced(tmp_path: Path) -> None:
    write_report(tmp_path / "report", TWO)
    with pytest.raises(InputError, match="exists already"):
        write_report(tmp_path / "report", {"results": []})
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == TWO
    write_report(tmp_path / "report", {"results": []}, force=True)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == {"results": []}
