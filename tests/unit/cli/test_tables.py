"""Tables at 80 columns, in a log, and on a terminal without UTF-8."""

from __future__ import annotations

import io
import sys

import pytest

from qwen3_export.cli.tables import drawn, plain

HEADERS = ["artifact", "runtime", "tokens", "KL (nats)", "95 %", "top-1", "ppl ratio", "loops/original's", "verdict"]
ROW = ["gptq-w4a16-g128", "onnxruntime", "10012", "≥ 0.02345", "0.02211 … 0.02480", "91.23 %", "1.0123", "3/4", "pass"]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["onnx", "a-rather-long-name-of-an-artifact-that-somebody-chose", "短い名前" * 6])
def test_name_kl_and_verdict_fit(width: int, name: str) -> None:
    text = drawn(HEADERS, [[name, *ROW[1:]], ROW], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert name in "".join(line.strip().split("  ")[0] for line in lines[3:] if line[1:2] != " ")
    for word in ("≥ 0.02345", "pass", "KL (nats)", "verdict"):
        assert word in text
    assert ("left out at this width" in text) == (width < 120)


def test_a_log_is_never_cut() -> None:
    long = "x" * 300
    text = drawn(HEADERS, [[long, *ROW[1:]]])
    assert long in text
    assert all(header in text for header in HEADERS)


def test_verdicts_are_coloured_on_a_terminal_alone() -> None:
    rows = [["a", "b", "pass"], ["c", "d", "FAIL"]]
    assert "\x1b[32mpass\x1b[0m" in drawn(["artifact", "runtime", "verdict"], rows, 80, colours=True)
    assert "\x1b[1;31mFAIL\x1b[0m" in drawn(["artifact", "runtime", "verdict"], rows, 80, colours=True)
    assert "\x1b" not in drawn(["artifact", "runtime", "verdict"], rows, 80)


def test_ascii_where_the_terminal_has_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = drawn(HEADERS, [ROW], 120)
    assert text.isascii()
    assert ">= 0.02345" in text
    assert "0.02211 ... 0.02480" in text
    assert plain("名前") == "??"
