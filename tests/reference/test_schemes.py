"""Folders of every scheme, loaded by transformers with compressed-tensors: its logits are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import qwen3_export
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.model.decoder import load_block
from tests.conftest import copy_tokenizer
from tests.reference.models import (
    assert_same_logits,
    dequantized,
    our_logits,
    random_rows,
    relative_error,
    their_logits,
)

BY_NAME = {
    "fp8 per channel, tokens": {"num_bits": 8, "type": "float", "strategy": "channel", "activations": "dynamic-token"},
    "fp8 per channel, static": {"num_bits": 8, "type": "float", "strategy": "channel", "activations": "static-tensor"},
    "fp8 per tensor, static": {"num_bits": 8, "type": "float", "strategy": "tensor", "activations": "static-tensor"},
    "fp8 in blocks": {"num_bits": 8, "type": "float", "strategy": "block", "activations": "dynamic-group"},
    "int8 per channel, tokens": {"num_bits": 8, "strategy": "channel", "activations": "dynamic-token"},
    "int4 signed scales": {"num_bits": 4, "group_size": 32, "signed_scales": True},
    "int3": {"num_bits": 3, "group_size": 32},
    "int2": {"num_bits": 2, "group_size": 32},
}
SMALL_SCALES = {
    "mxfp8": {"num_bits": 8, "type": "float", "group_size": 32, "scale_dtype": "e8m0"},
    "mxfp4": {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "e8m0"},
    "nvfp4": {"num_bits": 4, "type": "float", "group_size": 16, "scale_dtype": "e4m3"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with two of its layers."""
    from qwen3_export.core.source import open_source

    original = open_source("reference-model").folder
    folder = tmp_path_factory.mktemp("schemes") / "source"
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
    model.save_pretrained(folder)
    copy_tokenizer(original, folder)
    return folder


def quantized(source: Path, folder: Path, scheme: dict[str, Any], **recipe: Any) -> Path:
    """A folder quantized with one scheme for all linears."""
    path = folder / "recipe.yaml"
    values = {"name": "test", "method": "rtn", "rules": [{"match": "*", "scheme": scheme}], **recipe}
    path.write_text(yaml.safe_dump(values))
    qwen3_export.quantize(source, str(path), folder / "quantized", samples=4, sequence_length=64)
    return folder / "quantized"


@pytest.mark.parametrize("scheme", BY_NAME.values(), ids=BY_NAME)
def test_transformers_gives_our_logits(source: Path, tmp_path: Path, scheme: dict[str, Any]) -> None:
    folder = quantized(source, tmp_path, scheme)
    # Where inputs are rounded, an fp32 sum that falls next to a tie moves a code: a few in a million.
    tolerance = 2e-2 if "activations" in scheme else 2e-5
    assert_same_logits(folder, folder, tolerance)


@pytest.mark.parametrize("name", SMALL_SCALES)
def test_compressed_tensors_unpacks_our_small_floats(source: Path, tmp_path: Path, name: str) -> None:
    """Its linears in 8-bit scales need a GPU or bf16 throughout, so its own decompressor is asked for the weights."""
    folder = quantized(source, tmp_path, SMALL_SCALES[name])
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for module, ours in dequantized(folder).items():
        state = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}
        theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
        # It computes in bf16: products of 8-bit mantissas.
        np.testing.assert_allclose(theirs, ours, rtol=2.0**-7, atol=0)


def test_compressed_tensors_rounds_nvfp4_inputs_to_our_numbers(source: Path, tmp_path: Path) -> None:
    """Bit for bit in every linear; and the logits of transformers' model with these weights and inputs are ours."""
    folder = quantized(source, tmp_path, {**SMALL_SCALES["nvfp4"], "activations": "dynamic-group"})
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    args = QuantizationScheme(**group).input_activations
    assert args == PRESET_SCHEMES["NVFP4"]["input_activations"].model_copy(update={"observer": None})
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)

    def rounded(module: str, x: torch.Tensor) -> torch.Tensor:
        above = stored[f"{module}.input_global_scale"]
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), above)
        return fake_quantize(x, scale, zero, args, above)

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    random = torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, rounder in load_block(open_checkpoint(folder), layer).rounders.items():
            module = f"model.layers.{layer}.{name}"
            linear = model.get_submodule(module)
            x = torch.randn(2, 40, linear.in_features, generator=random) * torch.logspace(-3, 3, 40)[:, None]
            assert torch.equal(rounder(x), rounded(module, x))
            linear.register_forward_pre_hook(lambda _, inputs, module=module: rounded(module, inputs[0]))
    for module, weight in dequantized(folder).items():
        model.get_submodule(module).weight.data = torch.from_numpy(weight)
    ids = random_rows(model.config.vocab_size)[-1]
    # An fp32 sum that falls next to a tie moves a code: a few in a million.
    assert relative_error(our_logits(folder, [ids])[0], their_logits(model, ids)) < 2e-2


def test_the_fp8_layout_is_that_of_the_official_releases(source: Path, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "block", "activations": "dynamic-group"}
    folder = quantized(source, tmp_path, scheme, layout="fp8")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] == [128, 128]
    # Without a GPU transformers multiplies codes and scales at once; its kernels need one.
    options = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=options)
    weights = dict(theirs.named_parameters())
    for name, ours in dequantized(folder).items():
        np.testing.assert_allclose(weights[f"{name}.weight"].detach().numpy(), ours, rtol=0, atol=0)
