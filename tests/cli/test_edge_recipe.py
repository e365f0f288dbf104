"""Recipes for devices: what they quantize, their size, and what `onnx` says of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen3_export.core.qwen3 import EMBEDDING, HEAD, parse_config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.gguf import supports as gguf_supports
from qwen3_export.ship.onnx.ort_ops import supports as ort_supports
from tests.cli.conftest import SHORT
from tests.cli.helpers import call, refused
from tests.conftest import tiny_config

# hidden, intermediate, heads; all have 8 key/value heads of 128.
SHAPES = {"0.6B": (1024, 3072, 16), "1.7B": (2048, 6144, 16), "4B": (2560, 9728, 32), "8B": (4096, 12288, 32)}


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_near_four_and_a_half_bits(name: str) -> None:
    hidden, intermediate, heads = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    linears = parse_config(tiny_config(**sizes, num_key_value_heads=8, head_dim=128), name).all_linears()
    recipe = load_recipe("edge-mixed-4.5bpw")
    recipe.check_against(linears)
    bits = 0.0
    for linear, shape in linears.items():
        scheme = recipe.scheme_for(linear)
        assert scheme is not None
        assert gguf_supports(scheme) is None
        assert ort_supports(scheme) is None
        bits += scheme.bits_per_weight(shape) * math.prod(shape)
    assert bits / sum(map(math.prod, linears.values())) == pytest.approx(4.5, abs=0.13)


def test_it_arrives_exactly(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    assert call("quantize", model, "--recipe", "edge-mixed-4.5bpw", "--output", folder, *SHORT).code == 0
    for command, output in (("onnx", "model-onnx"), ("gguf", "model.gguf")):
        assert call(command, folder, "--output", tmp_path / output, "--json").json["exact"] is True


@pytest.mark.parametrize("name", ["edge-w4", "edge-w4-mixed", "edge-w8"])
def test_device_recipes_quantize_every_matrix(name: str) -> None:
    """Embedding and head too, as ONNX Runtime and llama.cpp take it; with all that the solver has."""
    matrices = parse_config(tiny_config(tie_word_embeddings=False, hidden_size=128), name).all_matrices()
    recipe = load_recipe(name)
    schemes = {module: recipe.scheme_for(module) for module in matrices}
    assert {EMBEDDING, HEAD} < schemes.keys()
    for scheme in schemes.values():
        assert scheme is not None
        assert gguf_supports(scheme) is None
        assert ort_supports(scheme) is None
    if name == "edge-w4":
        assert set(schemes.values()) == {QuantScheme(4, group_size=32, signed_scales=True)}
    assert (recipe.options["fold"], recipe.options["target_shift"]) == ("awq", True)
    assert name == "edge-w8" or recipe.options["output_rows"] > 0


def test_the_summary_tells_what_the_fast_level_and_a_small_cache_cost(made: dict[str, Path], tmp_path: Path) -> None:
    fast = call("onnx", made["quantized"], "--output", tmp_path / "fast", "--kv-cache", "int8")
    assert fast.code == 0, fast.err
    assert "4, activations rounded to int8; adds a KL of " in fast.out
    assert "int8 keys and values; adds a KL of " in fast.out
    # Both run it as it is, codes in the cache included.
    short = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", "--threads", "1")
    assert call("bench", tmp_path / "fast", *short).code == 0
    assert call("validate", tmp_path / "fast", "--reference", made["reference"], "--threads", "1").code == 0
    exact = call("onnx", made["quantized"], "--output", tmp_path / "exact", "--accuracy-level", "0")
    assert "0, activations as they are" in exact.out
    assert "adds a KL" not in exact.out


def test_data_files_have_a_largest_size(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("onnx", made["quantized"], "--output", tmp_path / "onnx", "--max-shard-size", "500KB", "--json")
    listed = [item["path"] for item in outcome.json["files"] if ".onnx.data" in item["path"]]
    assert {"model.onnx.data", "model.onnx.data_1"} <= set(listed)
    refused(call("onnx", made["quantized"], "--output", tmp_path / "out", "--max-shard-size", "big"), 2, "big", "2GB")
