"""Sequences that are decoded together get the logits that each gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.run.artifact import open_session
from qwen3_export.run.batch import batch_of
from qwen3_export.run.ort import OrtSession
from qwen3_export.run.session import RuntimeOptions
from tests.cli.helpers import call

_STEPS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("batch") / "onnx"
    outcome = call("onnx", "reference-model", "--precision", "fp32", "--output", output)
    assert outcome.code == 0, outcome.err
    return output


def alone(session: OrtSession, prompt: np.ndarray, steps: int) -> list[np.ndarray]:
    logits = [session.prefill(prompt)[-1]]
    while len(logits) <= steps:
        logits.append(session.decode(int(logits[-1].argmax())))
    return logits


def test_rows_of_different_lengths_join_and_leave(folder: Path) -> None:
    session = open_session(folder, RuntimeOptions(threads=1))
    assert isinstance(session, OrtSession)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 5000, length).astype(np.int32) for length in (7, 60, 1, 33)]
    # Long enough for the caches to grow past their first size.
    steps = [40, _STEPS, 25, 80]
    wanted = [alone(session, prompt, count) for prompt, count in zip(prompts, steps, strict=True)]
    batch = batch_of(session, 3)
    assert batch.slots == 3
    waiting, inside = list(range(4)), list[int]()
    seen: dict[int, list[np.ndarray]] = {}
    while waiting or inside:
        while waiting and len(inside) < batch.slots:
            number = waiting.pop(0)
            seen[number] = [batch.admit(prompts[number])]
            inside.append(number)
        logits = batch.step([int(wanted[n][len(seen[n]) - 1].argmax()) for n in inside])
        for place, number in enumerate(inside):
            seen[number].append(logits[place])
        for place in reversed(range(len(inside))):
            if len(seen[inside[place]]) == steps[inside[place]] + 1:
                batch.leave(place)
                last = inside.pop()
                if place < len(inside):
                    inside[place] = last
    for number, found in seen.items():
        np.testing.assert_allclose(np.array(found), np.array(wanted[number]), atol=2e-4, err_msg=str(number))
    session.close()
