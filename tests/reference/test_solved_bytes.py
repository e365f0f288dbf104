"""Recipes that solve give what was stored: the same bytes on a known kind of processor, nearly the same on any other.

A change of these hashes changes what users get, so it must be meant, and said in the changelog;
`python -m tests.reference.solved_bytes` then stores new ones. See `solved_bytes` for why other processors differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference.solved_bytes import (
    CODES,
    FORCED,
    HASHED_BLOCKS,
    NEAR_BLOCKS,
    QUICK,
    RECIPES,
    STORED,
    codes,
    errors,
    forced,
    kind,
    multiplied_in,
    sha256,
    solve,
)
from tests.unit.processors import needs_avx2

# Between AVX-512, AVX2 and no vectors at least 99.96 % of these codes were equal; 1 % more damping leaves 99.4 %.
EQUAL_CODES = 0.997
# Likewise 99.6 % of scales were within this tolerance; 1 % more damping leaves 98.8 %.
EQUAL_SCALES, SCALE_TOLERANCE = 0.99, 1e-3
# The median of a recipe's errors moved by 0.5 % at most; without coordinate descent it grows by 3 % and more.
ERROR_TOLERANCE = 0.015
by_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


def known_hashes(stored: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """Hashes of this kind of arithmetic, none where it is not among those that were stored."""
    for one in stored["kinds"]:
        if one["kind"] == here:
            return one["hashes"]
    return {}


@by_recipe
def test_the_bytes_are_those_that_were_stored(recipe: str, stored: dict[str, Any], tmp_path: Path) -> None:
    # They were stored from one thread.
    if known := known_hashes(stored, kind()):
        assert sha256(solve(recipe, tmp_path, threads=3, blocks=HASHED_BLOCKS)) == known[recipe]


@needs_avx2
@pytest.mark.parametrize("products", FORCED)
def test_so_they_are_where_this_processor_stands_in_for_another(products: str, stored: dict[str, Any]) -> None:
    found = forced(products)
    if known := known_hashes(stored, found["kind"]):
        assert found["hashes"] == known


@by_recipe
def test_any_processor_comes_near(recipe: str, stored: dict[str, Any], tmp_path: Path) -> None:
    with multiplied_in("fp32"):
        folder = solve(recipe, tmp_path, threads=2, blocks=NEAR_BLOCKS)
    assert_near(codes(recipe, folder), dict(np.load(CODES)))
    found, wanted = errors(folder), stored["errors"][recipe]
    assert found.keys() == wanted.keys()
    assert abs(np.median([found[name] / wanted[name] for name in wanted]) - 1) <= ERROR_TOLERANCE


def assert_near(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Assert that codes and scales of all linears together are nearly those that were stored."""
    equal: dict[str, list[np.ndarray]] = {"codes": [], "scales": []}
    for name, array in found.items():
        if name.endswith("/codes"):
            equal["codes"] += [(array & 15) == (wanted[name] & 15), array >> 4 == wanted[name] >> 4]
        else:
            equal["scales"].append(np.isclose(array, wanted[name], rtol=SCALE_TOLERANCE, atol=0))
    for what, least in (("codes", EQUAL_CODES), ("scales", EQUAL_SCALES)):
        assert not found or np.concatenate([array.ravel() for array in equal[what]]).mean() >= least, what


def test_every_recipe_is_stored(stored: dict[str, Any]) -> None:
    assert stored["errors"].keys() == RECIPES.keys()
    for one in stored["kinds"]:
        assert one["hashes"].keys() == set(QUICK if one["kind"]["settings"] else RECIPES)
    names = {f"{recipe}/{name}" for recipe, (_, linears) in RECIPES.items() for name in linears}
    assert set(np.load(CODES).files) == {f"{name}/{what}" for name in names for what in ("codes", "scales")}


def test_a_kind_is_stored_once_and_names_the_settings(stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [one["kind"] for one in stored["kinds"]]
    assert all(one not in kinds[:place] for place, one in enumerate(kinds))
    before = kind()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert kind() != before
