"""Calibration and held-out text that cannot be used: exit 2, the line is named, nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SHORT
from tests.cli.helpers import call, names, refused

WORDS = "one two three four five " * 40

BAD: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty text": ("text.txt", b"", ("text.txt", "no text")),
    "blank text": ("text.txt", b" \n \n", ("text.txt", "no text")),
    "no UTF-8": ("text.txt", b"a\xff\xfe", ("text.txt", "not a text file")),
    "empty lines": ("text.jsonl", b"\n\n", ("text.jsonl", "no text")),
    "broken line": ("text.jsonl", f'{{"text": "{WORDS}"}}\n{{"text": '.encode(), ("text.jsonl", "line 2")),
    "deep line": ("text.jsonl", b"[" * 100_000, ("text.jsonl", "line 1")),
    "no object": ("text.jsonl", b'{"text": "a"}\n\n[1]\n', ("text.jsonl", "line 3")),
    "text is a number": ("text.jsonl", b'{"text": 3}', ("text.jsonl", "line 1")),
    "message without a role": ("text.jsonl", b'{"messages": [{"content": "a"}]}', ("text.jsonl", "line 1")),
    "half a character": ("text.jsonl", f'{{"text": "\\ud800 {WORDS}"}}'.encode(), ("text.jsonl", "line 1")),
    "half a character in a chat": (
        "text.jsonl",
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        ("text.jsonl", "line 1"),
    ),
    "a key twice": ("text.jsonl", f'{{"text": "a", "text": "{WORDS}"}}'.encode(), ("text.jsonl, line 1", "'text'")),
    "a key twice in one value": (
        "text.json",
        f'[{{"text": "a",\n"text": "{WORDS}"}}]'.encode(),
        ("text.json", "'text'"),
    ),
    "unknown kind": ("text.csv", b"a,b", ("text.csv", ".jsonl")),
    "too short": ("text.txt", b"a few words", ("token",)),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_text_is_refused(case: str, model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    name, content, words = BAD[case]
    text = tmp_path / name
    text.write_bytes(content)
    out = tmp_path / "out"
    options = ("--recipe", "gptq-w4a16-g32", *SHORT, "--calibration", text)
    refused(call("quantize", model, "--output", out, *options), 2, *words)
    refused(call("reference", model, "--output", out, "--text", text), 2, *words)
    refused(call("validate", made["onnx"], "--reference", model, "--text", text, "--report", out), 2, *words)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
def test_absent_text_is_named(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--recipe", "gptq-w4a16-g32", "--calibration", tmp_path / name)
    refused(call("quantize", model, "--output", out, *options), 2, name)
    assert names(tmp_path) == []


def test_prompt_that_is_no_text(made: dict[str, Path]) -> None:
    refused(call("run", made["onnx"], "--prompt", "a\udcff"), 2, "--prompt")
