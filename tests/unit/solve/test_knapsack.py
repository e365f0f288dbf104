"""The budget solver against trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_export.solve.mixed_precision.knapsack import Choice, choose

choices = st.builds(Choice, st.integers(1, 40), st.integers(0, 1000).map(lambda n: n / 7))
problems = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=5)


def by_trying(units: list[list[Choice]], capacity: int) -> float | None:
    """The least loss of all combinations that fit."""
    combinations = itertools.product(*units)
    return min((sum(c.loss for c in combo) for combo in combinations if size(combo) <= capacity), default=None)


def size(combo: tuple[Choice, ...]) -> int:
    return sum(choice.bits for choice in combo)


@given(problems, st.integers(0, 200), st.sampled_from([1, 12, 4096]))
def test_it_is_the_best_of_all_combinations(units: list[list[Choice]], capacity: int, scale: int) -> None:
    scaled = [[Choice(choice.bits * scale, choice.loss) for choice in unit] for unit in units]
    picks = choose(scaled, capacity * scale)
    best = by_trying(units, capacity)
    if best is None:
        assert picks is None
        return
    assert picks is not None
    combo = tuple(unit[pick] for unit, pick in zip(scaled, picks, strict=True))
    assert size(combo) <= capacity * scale
    assert sum(choice.loss for choice in combo) == pytest.approx(best)


@given(problems, st.integers(0, 200), st.integers(1, 20))
def test_coarse_cells_keep_the_budget(units: list[list[Choice]], capacity: int, cells: int) -> None:
    picks = choose(units, capacity, most_cells=cells)
    smallest = sum(min(choice.bits for choice in unit) for unit in units)
    assert (picks is None) == (smallest > capacity)
    if picks is not None:
        assert size(tuple(unit[pick] for unit, pick in zip(units, picks, strict=True))) <= capacity


def test_coarse_cells_cost_at_most_one_cell_per_unit() -> None:
    """Sixty units of unlike sizes with far more exact cells than are allowed."""
    units = [[Choice(0, 1.0 + u % 7), Choice(1009 + 37 * u, 0.0)] for u in range(60)]
    capacity, cells = 60_000, 2000
    coarse, exact = choose(units, capacity, most_cells=cells), choose(units, capacity - 60 * capacity // cells)
    assert coarse is not None
    assert exact is not None
    losses = [sum(unit[pick].loss for unit, pick in zip(units, picks, strict=True)) for picks in (coarse, exact)]
    assert losses[0] <= losses[1]


def test_of_equal_losses_the_first_is_taken() -> None:
    assert choose([[Choice(4, 1.0), Choice(4, 1.0), Choice(2, 1.0)]], 10) == [0]


def test_a_budget_without_limit_takes_the_least_loss_everywhere() -> None:
    assert choose([[Choice(4, 2.0), Choice(8, 0.5)], [Choice(16, 0.0), Choice(4, 1.0)]], 10**15) == [1, 0]
