"""Every recipe that is shipped makes a folder that runs, as near to the original as its bits allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import EMBEDDING
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.resources import resource
from tests.cli.helpers import call
from tests.reference.models import our_logits, random_rows

# Largest change of the logits as a share of their size. Random weights are the hardest to round; logits of
# another model change by 1.4.
ALLOWED = {8: 0.2, 6: 0.3, 5: 0.45, 4: 0.6, 3: 0.9, 2: 1.25}
# Eight rows, of which the target shift holds one out.
SHORT = ("--samples", "8", "--sequence-length", "32")
NAMES = sorted(path.stem for path in resource("recipes").iterdir() if path.suffix == ".yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_quantizes(name: str, model: Path, tmp_path: Path) -> None:
    outcome = call("quantize", model, "--recipe", name, *SHORT, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    checkpoint = open_checkpoint(tmp_path / "out")
    rules = load_recipe(name).for_model(checkpoint.config).rules
    # The model's head is tied: embedding and head are one matrix.
    assert outcome.json["tensors"] == 14 + any(rule.match == EMBEDDING for rule in rules)
    assert set(checkpoint.schemes.values()) <= {rule.scheme for rule in rules}
    rows = random_rows(8192, [30])
    wanted, found = our_logits(model, rows)[0], our_logits(tmp_path / "out", rows)[0]
    # E4M3 with scales that are powers of two counts like six bits of an integer.
    schemes = checkpoint.schemes.values()
    fewest = min(6 if (s.num_bits, s.scale_dtype) == (8, "e8m0") else s.num_bits for s in schemes)
    change = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert change < ALLOWED[fewest]
