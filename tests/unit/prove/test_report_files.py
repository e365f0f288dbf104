"""A result to the files of a report: JUnit, Markdown, JSON."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.manifest import read_manifest
from qwen3_export.errors import InputError
from qwen3_export.prove.gate import check
from qwen3_export.prove.report import junit, markdown, write_report
from tests.unit.prove.reports import RESULT


def judged(limits: dict[str, float], **changes: Any) -> dict[str, Any]:
    result = {**{key: value for key, value in RESULT.items() if key not in ("decode", "tasks", "flips")}, **changes}
    return {**result, "gate": check(result, limits)}


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
