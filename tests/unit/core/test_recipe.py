"""Recipes: YAML in, a validated Recipe out; every refusal names the key and offers a remedy."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import Recipe, load_recipe, recipe_names
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.solve.methods import load_method
from tests.conftest import tiny_moe_config

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
LINEARS = {
    "model.layers.0.self_attn.q_proj": (128, 64),
    "model.layers.0.mlp.down_proj": (64, 96),
    "model.layers.1.mlp.down_proj": (64, 96),
}


def recipe_values(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "method": "rtn", "rules": [{"match": "*", "scheme": W4}], **changes}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """`load(key=value, …)` writes a valid recipe with these changes and loads it back by its path."""

    def from_file(**changes: Any) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(recipe_values(**changes)))
        return load_recipe(str(path))

    return from_file


def rules(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"match": match, "scheme": scheme} for match, scheme in pairs]


def test_a_recipe_file_is_read_as_written(load: Callable[..., Recipe]) -> None:
    recipe = load(description="text", options={"scale_search": "mse"}, calibration={"samples": 7})
    assert (recipe.name, recipe.method, recipe.description) == ("mine", "rtn", "text")
    assert recipe.rules[0].match == "*"
    assert recipe.rules[0].scheme == QuantScheme(num_bits=4, group_size=32)
    assert recipe.options == {"scale_search": "mse"}
    assert recipe.calibration == {"samples": 7}


def test_a_recipe_survives_its_own_dictionary(load: Callable[..., Recipe]) -> None:
    recipe = load(rules=rules(("*.o_proj", None), ("*", {**W4, "symmetric": False})))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "again") == recipe


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        ({"metod": "rtn"}, "metod", "method"),
        ({"rules": [{"match": "*", "scheme": {**W4, "groupsize": 32}}]}, "groupsize", "group_size"),
        ({"rules": [{"match": "*", "shceme": W4}]}, "shceme", "scheme"),
        ({"calibration": {"sample": 3}}, "sample", "samples"),
    ],
)
def test_an_unknown_key_is_refused_with_its_nearest_neighbour(
    load: Callable[..., Recipe], changes: dict[str, Any], key: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=f"unknown key '{key}'") as caught:
        load(**changes)
    assert caught.value.hint == f"did you mean {hint!r}?"


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones(load: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="unknown key 'zzz'") as caught:
        load(zzz=1)
    assert caught.value.hint is not None
    assert "rules" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 5},
        {"num_bits": 4.0},
        {"num_bits": "4"},
        {"num_bits": True},
        {"num_bits": [4]},
        {"type": "complex"},
        {"symmetric": 1},
        {"symmetric": "yes"},
        {"strategy": "row"},
        {"activations": "dynamic"},
        {"signed_scales": 1},
        {"scale_dtype": "fp8"},
        {"group_size": 0},
        {"group_size": -32},
        {"group_size": 32.0},
        {"group_size": None},
        {"group_size": True},
    ],
)
def test_a_wrong_scheme_value_is_refused_by_name(load: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    key, value = next(iter(changes.items()))
    with pytest.raises(RecipeError) as caught:
        load(rules=rules(("*", {**W4, **changes})))
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"name": None},
        {"method": ["rtn"]},
        {"rules": []},
        {"rules": None},
        {"rules": {"match": "*"}},
        {"rules": ["*"]},
        {"rules": [{"scheme": W4}]},
        {"rules": [{"match": "*", "scheme": "int4"}]},
        {"rules": [{"match": 3, "scheme": W4}]},
        {"options": [1]},
        {"calibration": "bundled"},
        {"calibration": {"samples": 0}},
        {"calibration": {"samples": -1}},
        {"calibration": {"samples": True}},
        {"calibration": {"sequence_length": 1.5}},
        {"experts": "share"},
        {"experts": 0},
        {"experts": {"min_tokens": -1}},
        {"experts": {"min_tokens": True}},
        {"experts": {"min_tokens": "64"}},
        {"experts": {"fallback": "skip"}},
        {"experts": {"fallback": None}},
    ],
)
def test_a_wrong_type_is_refused_before_anything_runs(load: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        load(**changes)


@pytest.mark.parametrize(
    "text",
    ["a: [1", "- 1", "", "just text", "\x00", "when: 2024-99-99", "[" * 1000, "!!python/object:os.system {}"],
    ids=["unclosed", "list", "empty", "scalar", "control", "impossible-date", "deep", "object"],
)
def test_a_file_that_is_no_recipe_is_one_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_bytes_that_are_no_text_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_an_unknown_name_suggests_the_nearest_recipe() -> None:
    with pytest.raises(RecipeError, match="gptq-w4a16-g12") as caught:
        load_recipe("gptq-w4a16-g12")
    assert caught.value.hint is not None
    assert "gptq-w4a16-g128" in caught.value.hint


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


def test_the_hash_ignores_name_and_description_and_nothing_else(load: Callable[..., Recipe]) -> None:
    base = load()
    assert load(name="other", description="else").sha256 == base.sha256
    others = [
        load(method="gptq"),
        load(options={"scale_search": "absmax"}),
        load(calibration={"samples": 3}),
        load(experts={"min_tokens": 64}),
        load(experts={"fallback": "rtn"}),
        load(rules=rules(("*", {**W4, "group_size": 16}))),
        load(rules=rules(("*.mlp.*", W4))),
        load(rules=rules(("*.o_proj", None), ("*", W4))),
    ]
    assert len({base.sha256, *(recipe.sha256 for recipe in others)}) == 1 + len(others)


def test_the_hash_is_that_of_the_sorted_json(load: Callable[..., Recipe]) -> None:
    values = load().to_dict()
    del values["name"], values["description"], values["layout"]
    assert load().sha256 == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("values", "label", "bits"),
    [
        (W4, "w4-g32-sym", 4 + 16 / 32),
        ({**W4, "group_size": 128, "symmetric": False}, "w4-g128-asym", 4 + 20 / 128),
        ({**W4, "num_bits": 8, "strategy": "channel", "group_size": None}, "w8-channel-sym", 8 + 16 / 256),
        ({**W4, "scale_dtype": "fp32"}, "w4-g32-sym", 5.0),
    ],
)
def test_label_and_bits_per_weight_count_scales_and_zero_points(
    values: dict[str, Any], label: str, bits: float
) -> None:
    scheme = QuantScheme.from_dict(values)
    assert (scheme.label, scheme.bits_per_weight((512, 256))) == (label, bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rtm"}, "unknown method 'rtm'"),
        ({"options": {"scale_serach": "mse"}}, "unknown key 'scale_serach'"),
        ({"options": {"scale_search": 1}}, "scale_search is 1, a str was expected"),
        ({"method": "gptq", "options": {"act_order": 1}}, "act_order is 1, a bool was expected"),
        ({"method": "gptq", "options": {"percdamp": "0.01"}}, "percdamp is '0.01', a float was expected"),
        (
            {"method": "gptq", "options": {"percdamp": float("nan")}},
            "percdamp is nan, a number from 0 to",
        ),
        (
            {"method": "gptq", "options": {"descent": 1_000_000_000}},
            "descent is 1000000000, a number from 0 to",
        ),
        ({"method": "gptq", "options": {"descent": 101}}, "descent is 101, at most 100 passes"),
        ({"method": "gptq", "options": {"descent": -1}}, "descent is -1, a number from 0 to"),
        (
            {"method": "gptq", "options": {"output_rows": -3}},
            "output_rows is -3, a number from 0 to 100,000 was expected",
        ),
    ],
)
def test_method_and_options_are_checked_before_the_work(
    load: Callable[..., Recipe], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_method(load(**changes))
