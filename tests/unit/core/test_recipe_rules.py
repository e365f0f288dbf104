"""Rules of a recipe: which scheme a tensor gets, and rules that fit no tensor."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import Recipe, load_recipe, recipe_names
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.solve.methods import load_method
from tests.conftest import tiny_moe_config
from tests.unit.core.recipes import LINEARS, W4, rules


def test_the_first_matching_rule_wins(load: Callable[..., Recipe]) -> None:
    w8 = {**W4, "num_bits": 8}
    recipe = load(rules=rules(("*.layers.1.*", "none"), ("*.down_proj", w8), ("*", W4)))
    found = {name: recipe.scheme_for(name) for name in LINEARS}
    assert [scheme and scheme.num_bits for scheme in found.values()] == [4, 8, None]


def test_patterns_are_case_sensitive_shell_wildcards(load: Callable[..., Recipe]) -> None:
    recipe = load(rules=rules(("model.layers.[0-2].mlp.*", W4)))
    names = ["model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj", "MODEL.layers.1.mlp.up_proj"]
    assert [recipe.scheme_for(name) is not None for name in names] == [True, False, False]


def test_a_group_that_does_not_divide_names_the_tensor_and_the_numbers(load: Callable[..., Recipe]) -> None:
    recipe = load(rules=rules(("*", {**W4, "group_size": 64})))
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj: its 96 inputs .* group_size 64"):
        recipe.check_against(LINEARS)


def test_a_rule_may_leave_the_indivisible_tensor_out(load: Callable[..., Recipe]) -> None:
    recipe = load(rules=rules(("*.down_proj", None), ("*", {**W4, "group_size": 64})))
    recipe.check_against(LINEARS)
    assert recipe.scheme_for("model.layers.0.self_attn.q_proj") is not None


OUTER = {"model.embed_tokens": (320, 64), "lm_head": (320, 64)}
W8 = {**W4, "num_bits": 8}


def test_embedding_and_head_are_reached_by_their_exact_names_alone(load: Callable[..., Recipe]) -> None:
    wild = load(rules=rules(("*", W4)))
    assert all(wild.scheme_for(name) is None for name in OUTER)
    named = load(rules=rules(("*", W4), ("lm_head", W8), ("lm_head", None)))
    named.check_against({**LINEARS, **OUTER})
    assert [named.scheme_for(name) for name in OUTER] == [None, QuantScheme(8, group_size=32)]
    with pytest.raises(RecipeError, match=r"'model\.embed\*' matches no linear") as caught:
        load(rules=rules(("model.embed*", W8), ("*", W4))).check_against({**LINEARS, **OUTER})
    assert "exactly model.embed_tokens" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((("lm_head", W8),), "lm_head is to be w8-g32-sym, .* which is to be 16 bits"),
        ((("lm_head", W8), ("model.embed_tokens", W4)), "lm_head is to be w8-g32-sym, .* which is to be w4-g32-sym"),
        ((("lm_head", None), ("model.embed_tokens", W4)), "lm_head is to be 16 bits, .* which is to be w4-g32-sym"),
    ],
)
def test_one_tied_matrix_has_one_scheme(load: Callable[..., Recipe], given: Any, found: str) -> None:
    recipe = load(rules=rules(*given, ("*", W4)))
    recipe.check_against({**LINEARS, **OUTER})
    tied = {**LINEARS, "model.embed_tokens": (320, 64)}
    with pytest.raises(RecipeError, match=found) as caught:
        recipe.check_against(tied)
    assert "a rule for model.embed_tokens decides" in str(caught.value.hint)


@pytest.mark.parametrize("head", [(), (("lm_head", W8),)])
def test_equal_rules_fit_a_tied_model_and_an_untied_one(load: Callable[..., Recipe], head: Any) -> None:
    recipe = load(rules=rules(("model.embed_tokens", W8), *head, ("*", W4)))
    recipe.check_against({**LINEARS, "model.embed_tokens": (320, 64)})
    recipe.check_against({**LINEARS, **OUTER})


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 8, "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "block", "activations": "dynamic-group"},
        {"num_bits": 4, "type": "float", "group_size": 16, "scale_dtype": "e4m3"},
    ],
)
@pytest.mark.parametrize("name", OUTER)
def test_their_rows_share_no_scale(load: Callable[..., Recipe], name: str, scheme: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{name} .*: .* none may share a scale"):
        load(rules=rules((name, scheme), ("*", W4))).check_against({**LINEARS, **OUTER})


def test_a_pattern_that_matches_nothing_is_refused(load: Callable[..., Recipe]) -> None:
    recipe = load(rules=rules(("*.dwon_proj", W4), ("*", W4)))
    with pytest.raises(RecipeError, match=r"'\*\.dwon_proj' matches no linear") as caught:
        recipe.check_against(LINEARS)
    assert caught.value.hint is not None
    assert next(iter(LINEARS)) in caught.value.hint


def test_a_recipe_that_quantizes_nothing_is_refused(load: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="quantizes no tensor"):
        load(rules=rules(("*", None))).check_against(LINEARS)


def test_only_block_linears_are_candidates() -> None:
    linears = parse_config(tiny_moe_config(), "test").all_linears()
    assert all(name.endswith("_proj") for name in linears)
    assert not any(fnmatch.fnmatch(name, "*.mlp.gate") for name in linears)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_applies_to_the_reference_model(name: str, reference_model: Checkpoint) -> None:
    recipe = load_recipe(name)
    recipe.for_model(reference_model.config).check_against(reference_model.config.all_matrices())
    module, options = load_method(recipe)
    assert recipe.name == name
    assert recipe.description
    assert module.__name__.endswith(recipe.method)
    assert all(getattr(options, key) == value for key, value in recipe.options.items())
