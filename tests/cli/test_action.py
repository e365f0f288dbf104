"""The composite action of action.yml: its steps are run as GitHub runs them, with the inputs in their environment."""

from __future__ import annotations

import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell_steps import ROOT, load, run_step

ACTION: dict[str, Any] = load("action.yml")
WORKFLOW: dict[str, Any] = load(".github/workflows/ci.yml")


def runs(step: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether a step's condition holds: only comparisons of an input with the empty text are used."""
    condition = step.get("if")
    if condition in (None, "always()"):
        return True
    match = re.fullmatch(r"inputs\.(\w+) != ''", condition)
    assert match, condition
    return inputs[match[1]] != ""


def act(folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """Run the shell steps, the first failure ends it; `qwen3-export` is this checkout's."""
    inputs = {name: str(item.get("default", "")) for name, item in ACTION["inputs"].items()} | {"extras": ""} | given
    required = [name for name, item in ACTION["inputs"].items() if item.get("required")]
    assert not [name for name in required if name not in given]
    done: subprocess.CompletedProcess[str] | None = None
    for step in ACTION["runs"]["steps"]:
        if "run" not in step or not runs(step, inputs):
            continue
        env = {
            name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda match: inputs[match[1]], value)
            for name, value in step["env"].items()
        }
        done = run_step(step["run"], folder, **env)
        if done.returncode:
            return done
    assert done is not None
    return done


@pytest.fixture
def job(made: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    (tmp_path / "gate.yaml").write_text("max_kl: 1\nmax_changed_sidecars: 0\n")
    artifacts = f"\n  {made['gguf']}\n{made['onnx']}\n"
    return {"artifacts": artifacts, "reference": str(made["reference"]), "gate": "gate.yaml", "threads": "1"}


def test_the_action_passes_reports_and_compares(job: dict[str, str], tmp_path: Path) -> None:
    done = act(tmp_path, **job)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "qwen3-report" / "report.json").read_text())
    assert [Path(item["artifact"]).name for item in report["results"]] == ["model.gguf", "model-onnx"]
    assert (tmp_path / "summary.md").read_text().startswith("# Validation\n\n**pass**")
    (tmp_path / "qwen3-report").rename(tmp_path / "baseline")
    again = act(tmp_path, **job, baseline="baseline", strict="true")
    assert again.returncode == 0, again.stderr
    suite = ElementTree.parse(tmp_path / "qwen3-report-gate" / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("8", "0")
    assert "# Gate against a baseline\n\n**same**" in (tmp_path / "summary.md").read_text()


def test_the_action_fails_where_a_limit_does(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("max_kl: 0\n")
    done = act(tmp_path, **job)
    assert done.returncode == 1
    assert "max_kl is " in done.stdout
    assert (tmp_path / "qwen3-report" / "report.html").is_file()
    assert "**FAIL**" in (tmp_path / "summary.md").read_text()


def test_what_is_kept_has_a_name_without_slashes(job: dict[str, str], tmp_path: Path) -> None:
    done = act(tmp_path, **job, report="out/a report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "github_output").read_text() == "name=out-a-report\n"
    assert (tmp_path / "out" / "a report" / "report.json").is_file()
    assert ACTION["runs"]["steps"][-1]["with"]["name"] == "${{ steps.kept.outputs.name }}"


def test_inputs_reach_the_shell_as_values_only() -> None:
    """An input that stood in a script would be run by it."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_this_projects_own_pipeline_uses_it() -> None:
    (step,) = [step for step in WORKFLOW["jobs"]["gate"]["steps"] if step.get("uses") == "./"]
    assert set(step["with"]) <= set(ACTION["inputs"])
    assert (ROOT / step["with"]["gate"]).is_file()
