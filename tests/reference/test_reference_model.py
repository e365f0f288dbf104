"""The embedded reference model: its logits and its perplexity are those that transformers gives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.prove.original import LiveReference
from qwen3_export.prove.validate import held_out
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.run.torch import TorchSession
from tests.reference.models import TOLERANCE, load_theirs, relative_error, their_logits


@pytest.fixture(scope="module")
def theirs(reference_folder: Path) -> Any:
    return load_theirs(reference_folder)


@pytest.fixture(scope="module")
def live(reference_model: Checkpoint) -> LiveReference:
    return LiveReference(reference_model, held_out(reference_model.folder, tokens=1500))


@pytest.fixture(scope="module")
def session(reference_folder: Path) -> Iterator[TorchSession]:
    session = TorchSession(reference_folder, RuntimeOptions())
    yield session
    session.close()


@pytest.mark.parametrize("row", range(3))
def test_logits_on_held_out_text_are_transformers(theirs: Any, live: LiveReference, session: Any, row: int) -> None:
    ids = live.samples.ids[row * 3]
    wanted = their_logits(theirs, ids)
    assert relative_error(live.logits(row * 3), wanted) <= TOLERANCE
    assert relative_error(session.prefill(ids), wanted) <= TOLERANCE


def test_decoding_one_by_one_gives_transformers_logits(theirs: Any, live: LiveReference, session: Any) -> None:
    ids = live.samples.ids[1][:60]
    wanted = their_logits(theirs, ids)
    session.prefill(ids[:40])
    for position in range(40, 60):
        assert relative_error(session.decode(int(ids[position])), wanted[position]) <= TOLERANCE


def test_the_perplexity_is_that_of_a_trained_model_and_transformers(theirs: Any, live: LiveReference) -> None:
    ours = np.concatenate([live.truth(row).next_logprob for row in range(len(live.samples.ids))])
    wanted = []
    for ids in live.samples.ids:
        logits = their_logits(theirs, ids)[:-1].astype(np.float64)
        total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        wanted.append(logits[np.arange(len(ids) - 1), ids[1:]] - total)
    np.testing.assert_allclose(ours, np.concatenate(wanted), atol=1e-4)
    # 8,192 tokens to choose from: an untrained model stands above 8,000.
    assert np.exp(-ours.mean()) < 100
