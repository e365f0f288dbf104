"""`config.json` → Qwen3Config: both spellings, transformers' own defaults, and every bad value by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig

from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.errors import CheckpointError
from tests.conftest import tiny_config, tiny_moe_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def parse(values: Any) -> Qwen3Config:
    return parse_config(values, "folder/config.json")


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def in_5x(values: dict[str, Any]) -> dict[str, Any]:
    """The spelling of transformers 5: one `rope_parameters`, `dtype` in place of `torch_dtype`."""
    scaling = dict(values.get("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    rope = {**scaling, "rope_theta": values["rope_theta"]}
    changed = without(values, "rope_theta", "rope_scaling", "torch_dtype")
    return {**changed, "rope_parameters": rope, "dtype": values["torch_dtype"]}


def refuses(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(values)
    assert "folder/config.json" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        tiny_config(),
        tiny_config(rope_theta=1e6, rope_scaling=None),
        tiny_config(rope_theta=1000000, rope_scaling=YARN),
        tiny_config(rope_scaling={**without(YARN, "rope_type"), "type": "yarn"}),
        tiny_config(rope_scaling={**YARN, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
        tiny_moe_config(),
    ],
)
def test_the_4x_and_5x_spellings_are_the_same_model(values: dict[str, Any]) -> None:
    assert parse(values) == parse(in_5x(values))
    assert parse({**values, **in_5x(values)}) == parse(values)


@pytest.mark.parametrize(
    "values",
    [
        tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=YARN),
        tiny_config(rope_parameters={**YARN, "rope_theta": 10000.0}, rope_scaling={**YARN, "factor": 2.0}),
    ],
)
def test_two_spellings_that_contradict_each_other_are_refused(values: dict[str, Any]) -> None:
    refuses(values, "contradict each other")


def test_the_experts_number_has_two_spellings() -> None:
    values = {**without(tiny_moe_config(), "num_experts"), "num_local_experts": 8}
    assert parse(values) == parse(tiny_moe_config())
    assert parse({**values, "num_experts": 8}) == parse(tiny_moe_config())
    refuses({**values, "num_local_experts": 0}, "num_local_experts is 0")


@pytest.mark.parametrize("values", [tiny_config(), tiny_moe_config()], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "key", ["head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "norm_topk_prob", "decoder_sparse_step"]
)
def test_a_missing_value_is_transformers_default(values: dict[str, Any], key: str) -> None:
    values = without(values, key, "tie_word_embeddings")
    theirs = AutoConfig.for_model(**values)
    ours = parse(values)
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    if ours.sparse_layers:
        assert ours.norm_topk_prob == theirs.norm_topk_prob
        assert len(ours.sparse_layers) == theirs.num_hidden_layers // theirs.decoder_sparse_step


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_parameters"])
def test_null_means_missing(key: str) -> None:
    assert parse(tiny_config(**{key: None})) == parse(without(tiny_config(), key))


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "num_experts",
        "moe_intermediate_size",
    ],
)
def test_a_missing_size_is_named(key: str) -> None:
    refuses(without(tiny_moe_config(), key), f"{key} is None")


SIZES = ["vocab_size", "num_hidden_layers", "head_dim", "num_key_value_heads", "num_experts", "decoder_sparse_step"]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, 1.5, 64.0, math.nan, math.inf, "64", True, [64], {}, 2**31, 10**30])
def test_a_size_that_is_no_positive_whole_number_is_named(key: str, value: Any) -> None:
    refuses(tiny_moe_config(**{key: value}), f"{key} is .* a positive whole number")


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, -math.inf, 1e40, "1e-6", True, [1.0]])
def test_a_number_that_is_not_positive_and_finite_is_named(key: str, value: Any) -> None:
    refuses(tiny_config(**{key: value}), f"{key} is .* a positive number")


@pytest.mark.parametrize("value", [math.nan, 0, -4.0, "4", None])
def test_a_yarn_factor_that_is_no_number_is_named(value: Any) -> None:
    refuses(tiny_config(rope_scaling={**YARN, "factor": value}), "factor is")


def test_values_survive_a_json_round_trip_with_nan() -> None:
    text = json.dumps(tiny_config(rms_norm_eps=math.nan))
    assert "NaN" in text
    refuses(json.loads(text), "rms_norm_eps is nan")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "norm_topk_prob"])
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_a_flag_that_is_no_boolean_is_named(key: str, value: Any) -> None:
    refuses(tiny_moe_config(**{key: value}), f"{key} is .* true or false")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a JSON object was expected, found list"),
        (None, "found NoneType"),
        ({}, "model_type is None"),
        (tiny_config(model_type="llama"), "model_type is 'llama', no Qwen3 model"),
        (tiny_config(model_type="qwen3_vl"), "model_type is 'qwen3_vl'"),
        (tiny_config(model_type=["qwen3"]), "model_type is"),
        (tiny_config(attention_bias=True), "attention_bias"),
        (tiny_config(use_sliding_window=True), "use_sliding_window"),
        (tiny_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (tiny_config(num_key_value_heads=3), "heads must be a multiple"),
        (tiny_config(num_key_value_heads=8), "heads must be a multiple"),
        (tiny_config(head_dim=31), "head_dim even"),
        (tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope type 'linear' is not supported"),
        (tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
        (tiny_config(rope_scaling="yarn"), "must be objects"),
        (tiny_config(rope_parameters=[1]), "must be objects"),
        (tiny_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (tiny_config(rope_scaling={**YARN, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (tiny_config(rope_scaling=YARN, rope_theta=1.0), "rope_theta is 1"),
        (tiny_config(rope_scaling={**YARN, "truncate": "no"}), "truncate is 'no'"),
        (tiny_moe_config(num_experts_per_tok=9), "num_experts_per_tok is 9, but there are 8 experts"),
        (tiny_moe_config(mlp_only_layers=3), "mlp_only_layers is 3"),
        (tiny_moe_config(mlp_only_layers="01"), "mlp_only_layers is '01'"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_name(values: Any, message: str) -> None:
    refuses(values, message)


def test_yarn_without_an_original_length_takes_the_present_one() -> None:
    scaling = without(YARN, "original_max_position_embeddings")
    assert parse(tiny_config(rope_scaling=scaling)).rope.original_max_position == 128


def test_names_and_shapes_of_a_dense_model() -> None:
    config = parse(tiny_config(num_hidden_layers=1))
    prefix = "model.layers.0."
    assert config.tensor_shapes() == {
        "model.embed_tokens.weight": (320, 64),
        "model.norm.weight": (64,),
        f"{prefix}input_layernorm.weight": (64,),
        f"{prefix}self_attn.q_norm.weight": (32,),
        f"{prefix}self_attn.k_norm.weight": (32,),
        f"{prefix}post_attention_layernorm.weight": (64,),
        f"{prefix}self_attn.q_proj.weight": (128, 64),
        f"{prefix}self_attn.k_proj.weight": (64, 64),
        f"{prefix}self_attn.v_proj.weight": (64, 64),
        f"{prefix}self_attn.o_proj.weight": (64, 128),
        f"{prefix}mlp.gate_proj.weight": (96, 64),
        f"{prefix}mlp.up_proj.weight": (96, 64),
        f"{prefix}mlp.down_proj.weight": (64, 96),
    }
    assert config.num_parameters == sum(math.prod(shape) for shape in config.tensor_shapes().values())


def test_a_mixture_has_a_router_and_three_linears_per_expert() -> None:
    config = parse(tiny_moe_config(num_hidden_layers=1, num_experts=3, tie_word_embeddings=False))
    shapes = config.tensor_shapes()
    assert shapes["model.layers.0.mlp.gate.weight"] == (3, 64)
    assert shapes["lm_head.weight"] == (320, 64)
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    wanted = {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}
    assert experts == {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": shape for e in range(3) for name, shape in wanted.items()
    }
    assert "model.layers.0.mlp.gate_proj.weight" not in shapes


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 3}, [2]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
        ({"decoder_sparse_step": 5}, []),
    ],
)
def test_which_layers_are_sparse(changes: dict[str, Any], sparse: list[int]) -> None:
    config = parse(tiny_moe_config(num_hidden_layers=4, **changes))
    assert [layer for layer in range(4) if config.is_sparse(layer)] == sparse
    assert [layer for layer in range(4) if "mlp.gate" in config.other_shapes(layer)] == sparse
    assert all("mlp.down_proj" in config.linear_shapes(layer) for layer in range(4) if layer not in sparse)
