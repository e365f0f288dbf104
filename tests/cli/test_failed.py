"""One artifact that cannot be measured: the others are, and the report says why it was not."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qwen3_export
from tests.cli.helpers import call, names, refused, reported

# Where another process has one of two processors, llama.cpp's second thread is waited for.
THREADS = ("--threads", "1")
BENCH = ("--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1")


@pytest.fixture
def broken(made: dict[str, Path], tmp_path: Path) -> Path:
    """The ONNX folder with half of its weights: it is opened only when it is measured."""
    folder = tmp_path / "broken-onnx"
    shutil.copytree(made["onnx"], folder)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    return folder


def _validate(broken: Path, made: dict[str, Path], folder: Path) -> tuple[str | Path, ...]:
    """A command that measures one artifact of two."""
    report = ("--report", folder / "report")
    return ("validate", broken, made["gguf"], "--reference", made["reference"], *report, *THREADS)


def _check(outcome: Any, command: str, report: Path, broken: Path, measured: Path) -> None:
    """The report, JSON and exit code of a run over `broken` and `measured`."""
    found = reported(outcome, command)
    assert [item["artifact"] for item in found["results"]] == [str(measured)]
    (item,) = found["failed"]
    assert (item["artifact"], item["exit_code"], found["passed"]) == (str(broken), 2, False)
    assert str(broken) in item["error"]
    assert outcome.code == 2
    assert [line for line in outcome.err.splitlines() if line.startswith("error: ")] == [f"error: {item['error']}"]
    assert json.loads((report / "report.json").read_text()) == found
    assert f"{broken.name}: not measured: {item['error']}" in (report / "report.md").read_text()
    suite = ElementTree.parse(report / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("errors"), suite.get("failures")) == ("2", "1", "0")
    assert suite.find(f"testcase[@classname='{broken.name}']/error") is not None


def test_validate_measures_the_others(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    asked = _validate(broken, made, tmp_path)
    _check(call(*asked, "--max-kl", "9", "--json"), "validate", tmp_path / "report", broken, made["gguf"])
    told = call(*asked, "--force")
    assert f"{broken.name}: not measured: " in told.out
    assert made["gguf"].name in told.out
    assert told.code == 2
    baseline = tmp_path / "baseline"
    assert call(*asked[:1], *asked[2:5], "--report", baseline).code == 0
    refused(call("gate", tmp_path / "report", "--baseline", baseline), 2, "was not measured", broken.name)
    inspected = call("inspect", tmp_path / "report", "--json").json["artifacts"]
    assert {item["artifact"]: item["kl_mean"] is not None for item in inspected} == {
        str(broken): False,
        str(made["gguf"]): True,
    }
    (error,) = (item["error"] for item in inspected if item["error"])
    assert f"{broken}: not measured: {error}" in call("inspect", tmp_path / "report").out
    assert str(broken) in error


def test_a_damaged_folder_does_not_cost_what_explains_the_others(
    made: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made["quantized"], folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    asked = ("validate", folder, made["quantized"], "--reference", model, "--tokens", "64", "--explain")
    outcome = call(*asked, "--report", tmp_path / "report", "--json", *THREADS)
    _check(outcome, "validate", tmp_path / "report", folder, made["quantized"])
    assert reported(outcome, "validate")["results"][0]["explain"]["blocks"]


def test_compare_says_who_is_left_out(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    asked = _validate(broken, made, tmp_path)
    assert call(*asked).code == 2
    outcome = call("compare", tmp_path / "report", "--json")
    assert [item["artifact"] for item in outcome.json["candidates"]] == [str(made["gguf"])]
    (note,) = outcome.json["notes"]
    assert note.startswith(f"{broken} is left out: it was not measured: ")
    assert f"warning: {note}" in outcome.err.splitlines()


def test_bench_measures_the_others(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    asked = ("bench", broken, made["gguf"], *BENCH, "--report", tmp_path / "report")
    _check(call(*asked, "--json"), "bench", tmp_path / "report", broken, made["gguf"])
    assert f"{broken.name}: not measured: " in call(*asked, "--force").out


def test_where_all_fail_the_report_says_why_of_each(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    asked = ("validate", broken, broken, "--reference", made["reference"], "--report", tmp_path / "report", "--json")
    outcome = call(*asked)
    found = reported(outcome, "validate")
    assert (outcome.code, found["results"], len(found["failed"])) == (2, [], 2)
    assert "error: 2 of 2 artifacts could not be measured, the first: " in outcome.err
    told = call(*asked[:-1], "--force", "--max-kl", "9")
    assert [line.partition(": ")[0] for line in told.out.splitlines() if line] == [broken.name, f"{broken.name} (2)"]
    assert "note: " not in told.err
    refused(
        call("gate", tmp_path / "report", "--baseline", tmp_path / "report"), 2, "none of its artifacts was measured"
    )


def test_one_artifact_alone_is_an_error_without_a_report(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    for asked in (("validate", broken, "--reference", made["reference"]), ("bench", broken, *BENCH)):
        refused(call(*asked, "--report", tmp_path / "report", "--json"), 2, str(broken))
    assert names(tmp_path) == [broken.name]


def test_the_python_interface_has_them_too(broken: Path, made: dict[str, Path], tmp_path: Path) -> None:
    result = qwen3_export.bench(
        [broken, made["gguf"]], prompt_tokens=(16,), new_tokens=2, repeat=1, report=tmp_path / "report"
    )
    assert [item["artifact"] for item in result["failed"]] == [str(broken)]
    assert not result["passed"]
    assert len(result["results"]) == 1
    assert f"<li>{broken.name}: not measured: " in result._repr_html_()


def test_one_artifact_needs_no_list_and_none_is_refused(broken: Path, made: dict[str, Path]) -> None:
    """The letters of a path are no artifacts, and an empty list does not pass."""
    for one in (made["gguf"], str(made["gguf"])):
        (result,) = qwen3_export.bench(one, prompt_tokens=(16,), new_tokens=2, repeat=1)["results"]
        assert result["artifact"] == str(made["gguf"])
    with pytest.raises(qwen3_export.errors.InputError, match=str(broken)):
        qwen3_export.validate(str(broken), made["reference"])
    for measure in (partial(qwen3_export.validate, reference=made["reference"], max_kl=1), qwen3_export.bench):
        with pytest.raises(qwen3_export.errors.InputError, match="nothing to measure"):
            measure([])


def test_the_memory_of_one_does_not_cost_the_others(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is nobody's input has its own exit code."""
    from qwen3_export.prove import validate as module

    opened = module.open_session

    def scarce(artifact: Path, options: Any) -> Any:
        if artifact == made["onnx"]:
            raise MemoryError("no room")
        return opened(artifact, options)

    monkeypatch.setattr(module, "open_session", scarce)
    outcome = call("validate", made["onnx"], made["gguf"], "--reference", made["reference"], "--json", *THREADS)
    assert outcome.code == 4
    found = reported(outcome, "validate")
    assert [item["exit_code"] for item in found["failed"]] == [4]
    assert [item["artifact"] for item in found["results"]] == [str(made["gguf"])]
