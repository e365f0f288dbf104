"""Completion in shells: their scripts, what they call, and a real bash that completes."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.helpers import COMMAND, finish, start

VARIABLE = "_QWEN3_EXPORT_COMPLETE"


@pytest.fixture
def on_the_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which `qwen3-export` is a command."""
    program = tmp_path / "bin" / "qwen3-export"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom qwen3_export.cli import main\nmain()\n")
    program.chmod(0o755)
    package = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": package}


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("bash", ("complete -o default -F _qwen3_export_completion qwen3-export", "COMP_WORDS")),
        ("zsh", ("#compdef qwen3-export", "compdef _qwen3_export_completion qwen3-export")),
        ("fish", ("complete --command qwen3-export", "commandline -cp")),
    ],
)
def test_each_shell_has_its_script(shell: str, words: tuple[str, ...]) -> None:
    outcome = finish(start(env={VARIABLE: f"source_{shell}"}))
    assert (outcome.code, outcome.err) == (0, "")
    for word in words:
        assert word in outcome.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=outcome.out, text=True, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("shell", "line"),
    [("zsh", "qwen3-export quan"), ("fish", "qwen3-export quan"), ("fish", "qwen3-export onnx --acc")],
)
def test_what_the_other_shells_ask_is_answered(shell: str, line: str) -> None:
    asked = {VARIABLE: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    outcome = finish(start(env=asked))
    assert (outcome.code, outcome.err) == (0, "")
    assert ("quantize" if line.endswith("quan") else "--accuracy-level") in outcome.out


# What bash does when TAB is pressed: the function is called with the words, and fills COMPREPLY.
COMPLETE = """
eval "$(_QWEN3_EXPORT_COMPLETE=source_bash qwen3-export)"
complete -p qwen3-export
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *' ' ]] && COMP_WORDS+=('')
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    _qwen3_export_completion qwen3-export
    echo "$line| ${COMPREPLY[*]//$'\\n'/ }"
done
"""
LINES = {
    "qwen3-export qua": ["quantize"],
    "qwen3-export re": ["recipes", "reference"],
    "qwen3-export recipes se": ["search"],
    "qwen3-export quantize reference-model --sam": ["--samples"],
    "qwen3-export quantize reference-model --recipe fp8-st": ["fp8-static"],
    "qwen3-export recipes show edge-w4-": ["edge-w4-mixed"],
    "qwen3-export inspect ref": [],
}


def test_bash_completes_commands_options_and_recipes(on_the_path: dict[str, str]) -> None:
    """Where nothing is found, `-o default` of the script has bash name files."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *LINES], env=on_the_path, capture_output=True, text=True, check=True
    )
    first, *answers = done.stdout.splitlines()
    assert first == "complete -o default -F _qwen3_export_completion qwen3-export"
    assert {line.partition("|")[0]: line.partition("|")[2].split() for line in answers} == LINES
    assert done.stderr == ""


def test_an_interactive_bash_completes_command_option_and_path(on_the_path: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my-checkpoint").mkdir()
    (tmp_path / "my-checkpoint" / "config.json").write_text("{}")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "-i"], {**on_the_path, "PS1": "ready> ", "TERM": "dumb"})
    try:
        _read(terminal, "ready> ")
        os.write(terminal, b'eval "$(_QWEN3_EXPORT_COMPLETE=source_bash qwen3-export)"\n')
        _read(terminal, "ready> ")
        os.write(terminal, b"qwen3-export insp\t")
        assert "qwen3-export inspect " in _read(terminal, "inspect ")
        os.write(terminal, b"my-ch\t")
        _read(terminal, "my-checkpoint/")
        os.write(terminal, b"con\t")
        _read(terminal, "config.json ")
        os.write(terminal, b"--verb\t")
        _read(terminal, "--verbose ")
    finally:
        os.close(terminal)
        os.kill(child, 9)
        os.waitpid(child, 0)


def _read(terminal: int, wanted: str, timeout: float = 60) -> str:
    """What a terminal shows, until what is wanted stands there."""
    shown, end = "", time.monotonic() + timeout
    while wanted not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 0.2)[0]:
            shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x07", "", os.read(terminal, 4096).decode("utf-8", "replace"))
    return shown


def test_an_answer_takes_less_than_a_second_of_the_processor(on_the_path: dict[str, str]) -> None:
    asked = {VARIABLE: "complete_bash", "COMP_WORDS": "qwen3-export quantize --sam", "COMP_CWORD": "2"}
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);" + (
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND],
        env={**on_the_path, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, seconds = done.stdout.split()
    assert (answer, float(seconds) < 1) == ("--samples", True), done.stdout
