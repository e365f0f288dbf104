"""Patterns of other tools: the first match as `re` finds it, and an end for those that would have none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_export.core.confined import confined
from qwen3_export.core.patterns import first_matches

NAMES = [f"model.layers.{n}.{part}" for n in range(3) for part in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate")]


@given(st.lists(st.sampled_from([r".*mlp\.gate$", r".*q_proj", r"model\.layers\.1\..*", "lm_head", r".*\.[0-9]+\..*"])))
def test_the_first_pattern_that_matches_is_found(patterns: list[str]) -> None:
    wanted = {name: next((p for p in patterns if re.match(p, name)), None) for name in NAMES}
    assert first_matches(patterns, NAMES) == {name: found for name, found in wanted.items() if found}


def test_groups_are_matched_too() -> None:
    found = first_matches([r"model\.layers\.(0|2)\..*_proj$", r".*(gate)"], NAMES)
    assert {name for name, pattern in found.items() if "0|2" in pattern} == {NAMES[0], NAMES[1], NAMES[6], NAMES[7]}
    assert {name for name, pattern in found.items() if "gate" in pattern} == {NAMES[2], NAMES[5], NAMES[8]}


@pytest.mark.parametrize("pattern", ["(.+)+x$", "(.*.*.*.*.*.*.*)*y", "(" * 4000, "a{1,65535}{1,65535}", "(", "[", "*"])
def test_a_pattern_without_an_end_or_sense_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_export.core.confined.SECONDS", 1.0)
    confined.cache_clear()
    with pytest.raises(ValueError, match=r"."):
        first_matches([pattern], NAMES)
    assert first_matches([r"(model)\..*"], NAMES[:1]) == {NAMES[0]: r"(model)\..*"}
    confined.cache_clear()
