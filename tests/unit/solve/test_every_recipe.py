"""Every shipped recipe on a mixture of experts: it ends, and the folder computes the model.

On a dense model they run from the command line, in `tests/cli/test_recipes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.recipe import Recipe, load_recipe, recipe_names
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import copy_tokenizer, tiny_moe_config, write_checkpoint
from tests.reference.models import our_logits, random_rows

# Whole runs, many of them.
pytestmark = pytest.mark.slow

SHAPE = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256, "rope_theta": 1e6}
# ggml's blocks are 256 weights long.
WIDE = {**SHAPE, "hidden_size": 256}
MODELS = {
    "moe": tiny_moe_config(**SHAPE, moe_intermediate_size=128, num_experts=4),
    "moe, wide": tiny_moe_config(**WIDE, moe_intermediate_size=256, num_experts=4),
}
ROWS = random_rows(8192)
# Root mean square error of the logits as a share of their own, on random weights and 288 tokens of calibration; another
# model's logits would be off by √2.
BOUNDS = {2: 1.2, 3: 0.95, 4: 0.7, 5: 0.6, 6: 0.5, 8: 0.25}


@pytest.fixture(scope="module")
def source_of(
    tmp_path_factory: pytest.TempPathFactory, reference_folder: Path
) -> Callable[[str], tuple[Checkpoint, np.ndarray]]:
    """`source_of(kind)` → a model and its logits."""
    made: dict[str, tuple[Checkpoint, np.ndarray]] = {}

    def get(kind: str) -> tuple[Checkpoint, np.ndarray]:
        if kind not in made:
            folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model", MODELS[kind])
            copy_tokenizer(reference_folder, folder)
            made[kind] = open_checkpoint(folder), np.concatenate(our_logits(folder, ROWS))
        return made[kind]

    return get


def bits(recipe: Recipe) -> int:
    """Bits of the narrowest scheme; E4M3 with scales that are powers of two counts like six bits of an integer."""
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme]
    return min(6 if (s.num_bits, s.scale_dtype) == (8, "e8m0") else s.num_bits for s in schemes)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_quantizes(name: str, source_of: Callable, tmp_path: Path) -> None:
    checkpoint, wanted = source_of("moe, wide" if name.startswith("gguf-") else "moe")
    recipe = load_recipe(name).for_model(checkpoint.config)
    quantize(checkpoint, recipe, tmp_path / "out", QuantizeSettings(samples=9, sequence_length=32))
    error = np.concatenate(our_logits(tmp_path / "out", ROWS)) - wanted
    assert 0 < np.sqrt(np.square(error).mean() / np.square(wanted).mean()) < BOUNDS[bits(recipe)]
