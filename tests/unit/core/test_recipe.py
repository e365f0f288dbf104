"""Recipes: YAML in, a validated Recipe out; every refusal names the key and offers a remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.recipe import Recipe, load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.solve.methods import load_method
from tests.unit.core.recipes import W4, rules


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
