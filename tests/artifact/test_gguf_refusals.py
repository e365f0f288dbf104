"""Exports to GGUF that are refused: schemes, types, and models that llama.cpp cannot express."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import recipe_names
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import CheckpointError, InputError, UnsupportedError
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import round_to_nearest, tiny_with_tokenizer, with_tokenizer
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

# Groups of 48 need widths of 96 throughout.
WIDTH_96 = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
UNFIT = [
    (QuantScheme(4, strategy="channel"), "multiple of 32", "gguf-q4_k_m"),
    (QuantScheme(8, strategy="channel"), "multiple of 32", "--type q8_0"),
    (QuantScheme(4, group_size=48), "multiple of 32", "gguf-q4_k_m"),
    (QuantScheme(4, group_size=16), "multiple of 32", "gguf-q4_k_m"),
    (QuantScheme(3, group_size=32), "no ggml block type has 3-bit", "gguf-q3_k_m"),
    (QuantScheme(2, group_size=32), "2-bit", "gguf-q2_k"),
    (QuantScheme(8, group_size=32, symmetric=False), "8-bit asymmetric", "--type q8_0"),
    (QuantScheme(8, "float", strategy="channel"), "no type of 8-bit floats", "--type q8_0"),
    (QuantScheme(8, "float", strategy="channel", activations="dynamic-token"), "activations", "gguf-q6_k"),
    (QuantScheme(4, "float", group_size=16, scale_dtype="e4m3"), "type for it, NVFP4, is not written", "gguf-q4_k_m"),
]


@pytest.mark.parametrize(("scheme", "reason", "remedy"), UNFIT, ids=lambda value: getattr(value, "label", None))
def test_schemes_that_do_not_fit(
    make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme, reason: str, remedy: str
) -> None:
    checkpoint = round_to_nearest(make_checkpoint(tiny_config(**WIDTH_96)), tmp_path / "quantized", ("*", scheme))
    with pytest.raises(UnsupportedError, match=reason) as caught:
        export_gguf(checkpoint, tmp_path / "out" / "model.gguf")
    assert "self_attn.q_proj" in str(caught.value)
    hint = caught.value.hint or ""
    assert remedy in hint
    assert set(re.findall(r"gguf-\w+", hint)) <= set(recipe_names())
    assert "g_idx" not in hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type_name", ["bf16", "q8_0", "q4_1"])
def test_codes_are_never_requantized(quantized: Callable, tmp_path: Path, type_name: str) -> None:
    checkpoint = open_checkpoint(quantized("gptq-w4a16-g128"))
    with pytest.raises(UnsupportedError, match="q4_0") as caught:
        export_gguf(checkpoint, tmp_path / "out" / "model.gguf", type_name)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_unknown_type(make_checkpoint: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q3_x: one of f16, bf16, q8_0, .* was expected"):
        export_gguf(open_checkpoint(make_checkpoint()), tmp_path / "out.gguf", "q3_x")


UNKNOWN_TO_LLAMACPP = [
    tiny_moe_config(norm_topk_prob=False),
    tiny_moe_config(mlp_only_layers=[0]),
    tiny_moe_config(decoder_sparse_step=2),
    tiny_config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 24.0}),
]


@pytest.mark.parametrize("config", UNKNOWN_TO_LLAMACPP, ids=["weights", "dense layer", "sparse step", "yarn beta"])
def test_models_that_llamacpp_cannot_express(tmp_path: Path, reference_folder: Path, config: dict) -> None:
    folder = tiny_with_tokenizer(tmp_path / "tiny", reference_folder, config)
    with pytest.raises(UnsupportedError) as caught:
        export_gguf(open_checkpoint(folder), tmp_path / "out" / "model.gguf")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_overflow_is_refused(tmp_path: Path, reference_folder: Path) -> None:
    config = tiny_config(vocab_size=8192)
    tensors = random_tensors(parse_config(config, "test"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    folder = with_tokenizer(write_checkpoint(tmp_path / "tiny", config, tensors), reference_folder)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj"):
        export_gguf(open_checkpoint(folder), tmp_path / "out" / "model.gguf", "f16")
    assert not list((tmp_path / "out").glob("*"))


def test_without_a_tokenizer(make_checkpoint: Callable, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        export_gguf(open_checkpoint(make_checkpoint()), tmp_path / "out" / "model.gguf")
    assert not list((tmp_path / "out").glob("*"))
