"""GPTQ on ggml's block types: fields that dequantize to what was optimised, far below rounding's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_export.core.gguf_types import module_types
from qwen3_export.core.qwen3 import EMBEDDING, parse_config
from qwen3_export.core.recipe import Recipe, load_recipe, recipe_names
from qwen3_export.core.scheme import GGML_TYPES, scheme_of_type
from qwen3_export.core.tensor import dequantize
from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import workers
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods import gptq, rtn
from tests.conftest import tiny_config

BLOCKS = sorted(name for name in GGML_TYPES if scheme_of_type(name).block_type is not None)


def group(name: str) -> LinearGroup:
    """A weight with correlated inputs of very different sizes."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 512, generator=random)
    mixing = torch.randn(512, 512, generator=random) / 512**0.5 + torch.eye(512)
    x = torch.randn(4096, 512, generator=random) @ mixing * torch.exp(torch.randn(512, generator=random))
    return LinearGroup({"w": weight}, {"w": scheme_of_type(name)}, x.T @ x / len(x), len(x))


def missed(given: LinearGroup, method: Any, options: Any) -> float:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ) of the stored numbers, dequantized as libggml does; the solver's own error agrees."""
    with workers(2) as pool:
        solved = method.solve(given, options, pool)["w"]
    weight, hessian = given.weights["w"].double(), given.hessian.double()
    delta = torch.from_numpy(dequantize(solved.tensor)).double() - weight
    found = float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum())
    assert solved.error == pytest.approx(found, rel=1e-3)
    return found


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.slow
def test_solved_codes_miss_far_less_than_rounded_ones(name: str) -> None:
    given = group(name)
    rounded = missed(given, rtn, rtn.Options(scale_search="hessian"))
    solved = missed(given, gptq, gptq.Options(percdamp=0.001))
    descended = missed(given, gptq, gptq.Options(percdamp=0.001, descent=2))
    assert solved < 0.75 * rounded
    assert descended < solved


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("gguf-")])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_type_becomes_llama_cpps_mix(name: str, tied: bool) -> None:
    config = parse_config(
        tiny_config(hidden_size=512, intermediate_size=768, num_hidden_layers=16, tie_word_embeddings=tied), "test"
    )
    recipe = load_recipe(name)
    found = recipe.for_model(config)
    found.check_against(config.all_matrices())
    wanted = module_types(config, recipe.file_type, weighed=True)
    assert EMBEDDING in wanted
    for module, type_name in wanted.items():
        assert found.scheme_for(module) == scheme_of_type(type_name), module
    assert found.for_model(config) == found


def test_own_rules_come_before_the_mix() -> None:
    values = {
        "name": "mine",
        "method": "gptq",
        "file_type": "q4_k_m",
        "rules": [{"match": "*.layers.0.*", "scheme": "q8_0"}, {"match": "*.o_proj", "scheme": "none"}],
        "layout": "ggml",
    }
    recipe = Recipe.from_dict(values, "mine.yaml")
    config = parse_config(tiny_config(hidden_size=256, intermediate_size=256), "test")
    found = recipe.for_model(config)
    assert found.scheme_for("model.layers.0.self_attn.q_proj") == scheme_of_type("q8_0")
    assert found.scheme_for("model.layers.1.self_attn.o_proj") is None
    assert found.scheme_for("model.layers.1.mlp.up_proj") == scheme_of_type("q4_k")
    assert Recipe.from_dict(recipe.to_dict(), "again") == recipe


def test_an_unknown_file_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="q9_z"):
        Recipe.from_dict({"name": "x", "method": "gptq", "file_type": "q9_z"}, "x.yaml")


def test_zero_weights_and_zero_groups_have_no_nan() -> None:
    given = group("q4_k")
    weight = given.weights["w"].clone()
    weight[3], weight[:, 64:96] = 0, 0
    empty = LinearGroup({"w": weight}, given.schemes, given.hessian, given.tokens)
    with workers(1) as pool:
        solved = gptq.solve(empty, gptq.Options(descent=1), pool)["w"]
    values = dequantize(solved.tensor)
    assert np.isfinite(values).all()
    assert np.abs(values[3]).max() < 1e-6
