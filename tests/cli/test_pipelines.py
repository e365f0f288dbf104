"""Pipelines that this project ships or shows: they fit their hosts' schemas, and every shell step of them runs."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.helpers import call
from tests.cli.shell_steps import ROOT, load, run_step, summary_of
from tests.cli.test_action import act

GUIDE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def shown(beginning: str) -> str:
    """The YAML block of the guide that begins with some words."""
    (block,) = [text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if text.startswith(beginning)]
    return str(block)


def fits(kind: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against a schema that comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", kind, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_what_github_takes_and_end_in_time(path: Path) -> None:
    for kind in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        done = fits(kind, path)
        assert done.returncode == 0, done.stdout


def test_the_action_is_what_github_takes(tmp_path: Path) -> None:
    assert fits("vendor.github-actions", ROOT / "action.yml").returncode == 0
    wrong = tmp_path / "action.yml"
    wrong.write_text((ROOT / "action.yml").read_text().replace("shell: bash", "shel: bash", 1))
    assert fits("vendor.github-actions", wrong).returncode == 1


def test_the_steps_of_the_guide_make_a_workflow(tmp_path: Path) -> None:
    steps = yaml.safe_load(shown("- uses: actions/checkout"))
    given = next(step["with"] for step in steps if "qwen3-export" in step["uses"])
    action = load("action.yml")["inputs"]
    assert set(given) <= set(action)
    assert {name for name, item in action.items() if item.get("required")} <= set(given)
    job = {"runs-on": "ubuntu-latest", "timeout-minutes": 20, "steps": steps}
    path = tmp_path / "workflow.yml"
    path.write_text(yaml.safe_dump({"name": "gate", "on": ["push"], "jobs": {"gate": job}}))
    done = fits("vendor.github-workflows", path)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the job `gate` of this project's workflow after its shell steps."""
    folder = tmp_path_factory.mktemp("job")
    (folder / ".ci").symlink_to(ROOT / ".ci")
    for step in load(".github/workflows/ci.yml")["jobs"]["gate"]["steps"]:
        script = step.get("run", "")
        # Everything that a user installs is here already; that its extras exist is checked below.
        if script and not script.startswith("python -m pip"):
            done = run_step(script, folder)
            assert done.returncode == 0, done.stderr
    return folder


def test_the_project_gates_its_own_model_through_its_action(gated: Path) -> None:
    steps: list[dict[str, Any]] = load(".github/workflows/ci.yml")["jobs"]["gate"]["steps"]
    (given,) = [step["with"] for step in steps if step.get("uses") == "./"]
    done = act(gated, **given)
    assert done.returncode == 0, done.stderr
    assert "**pass**" in summary_of(gated).read_text()
    assert "**same**" in summary_of(gated).read_text()


def test_gitlabs_example_is_what_gitlab_takes_and_runs(gated: Path, tmp_path: Path) -> None:
    text = shown("qwen3-gate:")
    (tmp_path / "gitlab-ci.yml").write_text(text)
    done = fits("vendor.gitlab-ci", tmp_path / "gitlab-ci.yml")
    assert done.returncode == 0, done.stdout
    job = yaml.safe_load(text)["qwen3-gate"]
    (tmp_path / "gate.yaml").write_text(shown("max_kl:"))
    (tmp_path / "model-q8_0.gguf").symlink_to(gated / "model-q8_0.gguf")
    (tmp_path / "original-ci.safetensors").symlink_to(gated / "original.safetensors")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "report").symlink_to(gated / "baseline")
    for line in job["script"]:
        done = run_step(line, tmp_path)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    for path in job["artifacts"]["paths"]:
        assert (tmp_path / path / "report.html").is_file()
    for path in job["artifacts"]["reports"]["junit"]:
        assert ElementTree.parse(tmp_path / path).getroot().get("failures") == "0"


def test_every_extra_that_a_pipeline_installs_exists() -> None:
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    texts = [GUIDE, *(path.read_text() for path in WORKFLOWS)]
    named = {
        name
        for text in texts
        for found in re.findall(r"(?:qwen3-export|'\.)\[([\w,]+)\]", text)
        for name in found.split(",")
    }
    named |= set(str(load("action.yml")["inputs"]["extras"]["default"]).split(","))
    assert named
    assert named <= extras


@pytest.mark.parametrize(("tag", "code"), [(f"v{version('qwen3-export')}", 0), ("v0.0.1-other", 1)])
def test_a_release_is_made_only_of_the_version_that_its_tag_names(tmp_path: Path, tag: str, code: int) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"qwen3_export-{version('qwen3-export')}-py3-none-any.whl").touch()
    steps = load(".github/workflows/release.yml")["jobs"]["build"]["steps"]
    (script,) = [step["run"] for step in steps if step.get("run", "").startswith("test ")]
    assert run_step(script, tmp_path, GITHUB_REF_NAME=tag).returncode == code
    (tried,) = [step["run"] for step in steps if "recipes list" in step.get("run", "")]
    for command in tried.split(" && ")[1:]:
        assert call(*command.split()[1:]).code == 0
