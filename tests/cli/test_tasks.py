"""`tasks`, `validate --tasks` and `--explain`, `reference --merge` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.helpers import call, refused

SHORT = ("--tokens", "300", "--threads", "1")


def test_tasks_are_answered_by_both_models(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    tasks, reference = tmp_path / "tasks.jsonl", tmp_path / "reference.safetensors"
    assert call("tasks", "--output", tasks, "--count", "3").code == 0
    written = call("reference", model, "--output", reference, "--tokens", "300", "--tasks", tasks, "--json").json
    assert (written["tasks"], written["tasks_right"]) == (3, 0)
    command = ("validate", made["onnx"], "--reference", reference, "--threads", "1", "--tasks", tasks)
    found = call(*command, "--json").json["results"][0]["tasks"]
    assert (found["tasks"], found["original_right"], found["right_to_wrong"]) == (3, 0, 0)
    assert "the original gets 0 of 3 tasks right" in call(*command).out
    refused(call("validate", made["onnx"], "--reference", made["reference"], "--tasks", tasks), 2, "--tasks")


def test_drift_is_traced_beside_the_original_alone(made: dict[str, Path], model: Path) -> None:
    outcome = call("validate", made["quantized"], "--reference", model, *SHORT, "--explain", "--json")
    found = outcome.json["results"][0]["explain"]
    assert [block["block"] for block in found["blocks"]] == [0, 1]
    assert found["linears"][0]["error"] > 0
    assert "relative error" in call("validate", made["quantized"], "--reference", model, *SHORT, "--explain").out
    refused(call("validate", made["onnx"], "--reference", model, *SHORT, "--explain"), 2, "no Hugging Face folder")
    refused(call("validate", made["quantized"], "--reference", made["reference"], "--explain"), 2, "--explain")


def test_references_are_merged(model: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        text = tmp_path / f"{number}.txt"
        text.write_text(f"Number {number} is a number of the numbers. " * 30)
        paths.append(tmp_path / f"{number}.safetensors")
        command = ("reference", model, "--output", paths[-1], "--text", f"part-{number}={text}")
        assert call(*command).code == 0
    merged = call("reference", paths[0], "--merge", paths[1], "--output", tmp_path / "all.safetensors", "--json").json
    assert merged["domains"] == ["part-0", "part-1"]
    assert json.loads(json.dumps(merged))["rows"] >= 2
    refused(call("reference", "absent", "--merge", paths[1], "--output", tmp_path / "x"), 2, "absent: no such file")
