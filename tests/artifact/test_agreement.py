"""One model, four runtimes: torch, ONNX Runtime's fused operators, ONNX's standard ones, and llama.cpp, all computing
in fp32 from the same codes, must give the same logits on held-out text, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.artifact.support import SAME, largest_difference, logits

RECIPES = ["original", "gptq-w4a16-g128", "gptq-w4a16-g32", "gptq-w4a16-g128-head8", "rtn-w8a16"]


@pytest.fixture(scope="module")
def answers(onnx_folder: Callable, expanded_gguf: Callable, torch_logits: Callable, rows: list[NDArray]) -> Callable:
    """`answers(recipe)` → `{runtime: logits}`."""
    made: dict[str, dict[str, list[NDArray]]] = {}

    def get(name: str) -> dict[str, list[NDArray]]:
        if name not in made:
            made[name] = {
                "torch": torch_logits(name),
                "ort": logits(onnx_folder(name, accuracy_level=0).path, rows),
                "standard": logits(onnx_folder(name, flavor="standard").path, rows, exact=True),
                "llama.cpp": logits(expanded_gguf(name), rows, exact=True),
            }
        return made[name]

    return get


@pytest.mark.parametrize("pair", combinations(("torch", "ort", "standard", "llama.cpp"), 2), ids=" and ".join)
@pytest.mark.parametrize("name", RECIPES)
def test_two_runtimes_agree(answers: Callable, name: str, pair: tuple[str, str]) -> None:
    a, b = (answers(name)[runtime] for runtime in pair)
    assert largest_difference(a, b) < 2 * SAME


@pytest.mark.parametrize(("one", "other"), combinations(RECIPES, 2))
def test_recipes_do_not_agree(answers: Callable, one: str, other: str) -> None:
    """Otherwise the agreement above could come from the same weights in every file."""
    assert largest_difference(answers(one)["llama.cpp"], answers(other)["llama.cpp"]) > 100 * SAME


def test_every_position_was_compared(answers: Callable, rows: list[NDArray]) -> None:
    for logits_of in answers("original").values():
        assert [len(item) for item in logits_of] == [len(ids) for ids in rows]
        assert all(np.isfinite(item).all() for item in logits_of)
