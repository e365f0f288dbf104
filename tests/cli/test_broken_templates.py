"""A chat template that fails is told by every command that writes, before `run` and servers meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen3_export.core import text_files
from tests.cli.helpers import call, refused

COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("--recipe", "rtn-w4a16-g32"),
    "onnx": ("--recipe", "rtn-w4a16-g32"),
    "gguf": ("--recipe", "rtn-w4a16-g32"),
    "tensorrt": ("--onnx-only",),
}
RAISES = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is wanted') }}{% endif %}"
TOLD = (
    "warning: broken/{}: `run` and servers will fail with it in what is written. Mend it, take the original model's, "
    "or remove it\n"
)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to give it a template."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def stated(folder: Path, template: object) -> Path:
    """State a template in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def warnings_of(*command: object) -> list[str]:
    outcome = call(*command)
    assert outcome.code == 0, outcome.err
    return [line + "\n" for line in outcome.err.splitlines() if line.startswith("warning: broken")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_that_fails_is_told_once(command: str, broken: Path, tmp_path: Path) -> None:
    stated(broken, RAISES)
    line = (command, broken, "--output", tmp_path / "out", *COMMANDS[command])
    told = TOLD.format("tokenizer_config.json: the chat template fails (a system message is wanted)")
    assert warnings_of(*line) == [told]
    assert call(*line, "--force", "--quiet").err == ""
    if command != "tensorrt":
        outcome = call("run", tmp_path / "out", "--prompt", "hi", "--max-new-tokens", "1")
        refused(outcome, 2, "the chat template failed: a system message is wanted")


def test_a_repository_tells_it_too(made: dict[str, Path], tmp_path: Path) -> None:
    artifact = stated(Path(shutil.copytree(made["onnx"], tmp_path / "broken")), RAISES)
    told = TOLD.format("tokenizer_config.json: the chat template fails (a system message is wanted)")
    assert warnings_of("triton", artifact, "--output", tmp_path / "out") == [told]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"chat_template.jinja": "{% for %}"}, "chat_template.jinja: the chat template fails (Expected an expression"),
        (
            {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "{% if %}"},
            "additional_chat_templates/tool_use.jinja: the chat template tool_use fails (Expected an expression",
        ),
        ({"chat_template.jinja": b"\xff\x00"}, "chat_template.jinja: not a text file"),
        ({"chat_template.jinja": "{{ 1 / 0 }}"}, "chat_template.jinja: the chat template fails (division by zero)"),
    ],
    ids=["no template", "one for tools", "no text", "failing"],
)
def test_files(files: dict[str, str | bytes], told: str, broken: Path, tmp_path: Path) -> None:
    for name, content in files.items():
        (broken / name).parent.mkdir(exist_ok=True)
        (broken / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (warning,) = warnings_of("onnx", broken, "--output", tmp_path / "out")
    assert warning.startswith(f"warning: broken/{told}")


def test_values_that_are_no_template(broken: Path, tmp_path: Path) -> None:
    stated(broken, 3)
    (warning,) = warnings_of("onnx", broken, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out")
    assert warning == TOLD.format("tokenizer_config.json: chat_template is no text and no list of names and texts")


def test_a_sound_template_and_none_are_not_told(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {"name": "tool_use", "template": "{{ tools[0].name }}"}
    stated(broken, [{"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}, tools])
    command = ("onnx", broken, "--output", tmp_path / "out", "--force")
    assert warnings_of(*command) == []
    # Where there is none, no process is started.
    monkeypatch.setattr(text_files, "confined", None)
    stated(broken, None)
    assert warnings_of(*command) == []
