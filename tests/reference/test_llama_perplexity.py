"""Our statistics and those that llama-perplexity prints, of the same artifact, text and logits: equal as printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.prove.drift import sample_drift
from qwen3_export.prove.reference import Truth, log_softmax
from qwen3_export.prove.statistics import statistics
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from tests.reference.llama_perplexity import (
    ROW,
    ROWS,
    Printed,
    Unavailable,
    base_answers,
    make_inputs,
    parsed,
    printed_by,
    program,
)

# The program leaves out of its KL what the original gives less than e^-16.
LEAST = -16.0
STORED = Path(__file__).with_name("llama_perplexity.txt")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("llama-perplexity"))


def logits(artifact: Path, ids: np.ndarray) -> np.ndarray:
    """Our session's logits of the scored half of every row, and of the position after it, `[rows, half, vocab]`."""
    session = open_session(artifact, RuntimeOptions(exact=True, threads=1))
    found = np.stack([session.prefill(row)[ROW // 2 :] for row in ids])
    session.close()
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def ours(ids: np.ndarray, base: np.ndarray, artifact: np.ndarray) -> dict[str, float]:
    drifts = []
    for row, kept, found in zip(ids[:, ROW // 2 :], base, artifact, strict=True):
        following = np.take_along_axis(kept, row[1:, None].astype(np.int64), 1)[:, 0]
        drifts.append(sample_drift(Truth(np.where(kept > LEAST, kept, -200).astype(np.float32), following), found, row))
    return flat(statistics(drifts))


def same_digits(found: dict[str, float], printed: dict[str, Printed], units: Mapping[str, int] | None = None) -> None:
    """Every printed figure is ours, rounded; one unit of its last digit may be between, or as many as `units` says."""
    assert set(printed) == set(found)
    off = {
        name: (found[name], item.value)
        for name, item in printed.items()
        if abs(found[name] - item.value) > (2 * (units or {}).get(name.partition(".")[0], 1) + 1.02) * item.half
    }
    assert not off


def test_every_figure_is_the_one_that_the_program_prints(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    try:
        command = program(tmp_path)
    except Unavailable as reason:
        pytest.skip(f"needs llama-perplexity, which Debian's packages have: {reason}")
    table = parsed(printed_by(command, inputs, tmp_path / "base.bin"))
    ids, base = base_answers(tmp_path / "base.bin")
    assert base.shape[:2] == (ROWS, ROW // 2 - 1)
    # The program has another version of the kernels: without AVX-512 a largest difference was 1.6e-6 apart.
    same_digits(ours(ids, base, logits(inputs[1], ids)), table, {"kl": 2})
    assert 0.001 < table["kl.mean"].value < 0.1


def test_every_figure_is_the_one_that_the_program_printed_elsewhere(inputs: tuple[Path, Path, Path]) -> None:
    from qwen3_export.core.source import open_source
    from qwen3_export.text.tokenizer import ModelTokenizer

    text = inputs[2].read_text(encoding="utf-8")
    tokens = ModelTokenizer(open_source("reference-model").folder).encode(text)
    ids = np.array(tokens[: ROW * ROWS], np.int32).reshape(ROWS, ROW)
    base = kept(logits(inputs[0], ids)[:, :-1])
    # The original's logits come from another build: single steps of its 16 bits may be others.
    elsewhere = {"kl": 6, "ppl_reference": 50, "ppl_difference": 50}
    same_digits(ours(ids, base, logits(inputs[1], ids)), parsed(STORED.read_text(encoding="utf-8")), elsewhere)


def kept(answers: np.ndarray) -> np.ndarray:
    """Log-probabilities as the base file keeps them: 65,535 steps over at most 16 nats."""
    logprobs = log_softmax(answers)
    top = logprobs.max(-1, keepdims=True)
    least = np.maximum(logprobs.min(-1, keepdims=True), top + LEAST)
    step = (top - least) / 65535
    steps = np.where(logprobs > least, np.rint((logprobs - least) / step), 0)
    return (step * steps + least).astype(np.float32)
