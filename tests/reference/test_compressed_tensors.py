"""Folders that compressed-tensors and transformers write: we read the weights and logits that they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.decoder import load_block
from tests.conftest import write_checkpoint
from tests.reference.foreign import ALL, WIDE, labels, our_linears
from tests.reference.models import assert_same_logits, dequantized, load_theirs

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
# compressed-tensors

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True, "num_bits": 8}
STATIC = {"symmetric": True, "strategy": "tensor", "dynamic": False, "num_bits": 8}


def linear(weights: dict[str, Any], inputs: dict[str, Any] | None = None, *targets: str) -> dict[str, Any]:
    activations = {**inputs, "type": weights["type"]} if inputs else None
    return {"targets": list(targets or ["Linear"]), "weights": weights, "input_activations": activations}


def theirs(
    folder: Path,
    *groups: dict[str, Any],
    ignore: tuple[str, ...] = (),
    dtype: Any = torch.bfloat16,
    config: dict[str, Any] = WIDE,
) -> Path:
    """A random model, quantized to its own ranges and saved by compressed-tensors and transformers."""
    source = write_checkpoint(folder / "source", config)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    kept = ["lm_head"] if config["tie_word_embeddings"] else []
    apply_quantization_config(model, QuantizationConfig(config_groups=named, ignore=[*kept, *ignore]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            set_ranges(module, module.quantization_scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "quantized")
    compressor.update_config(folder / "quantized")
    return folder / "quantized"


def set_ranges(module: Any, weights: Any) -> None:
    """Scales and zero points from the smallest and the largest weight of each group, block, row or matrix."""
    weight, (out, inputs) = module.weight.data.float(), module.weight.shape
    down, across = {
        "tensor": (out, inputs),
        "channel": (1, inputs),
        "block": tuple(weights.block_structure or ()),
    }.get(weights.strategy, (1, weights.group_size))
    cells = weight.reshape(out // down, down, inputs // across, across)
    low, high, shared = cells.amin((1, 3)), cells.amax((1, 3)), None
    if hasattr(module, "weight_global_scale"):
        shared = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(shared)
    scale, zero = calculate_qparams(low, high, weights, global_scale=shared)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if not weights.symmetric:
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    for name, value in (("input_scale", 0.01), ("input_global_scale", 300.0)):
        if hasattr(module, name):
            getattr(module, name).data.fill_(value)


FOLDERS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "w4 g32": ("w4-g32-sym", [linear(INT4)], {}),
    "w4 g32 in fp16": ("w4-g32-sym", [linear(INT4)], {"dtype": torch.float16}),
    "w3 channel in fp32": (
        "w3-channel-sym",
        [linear({**INT8, "num_bits": 3})],
        {"dtype": torch.float32},
    ),
    "w8 channel": ("w8-channel-sym", [linear(INT8)], {}),
    "w8a8": ("w8-channel-sym-dynamic-token", [linear(INT8, TOKEN)], {}),
    "w8a8 static": ("w8-channel-sym-static-tensor", [linear(INT8, STATIC)], {}),
    "fp8": ("fp8-channel-dynamic-token", [linear(FP8, TOKEN)], {}),
    "fp8 tensor": ("fp8-tensor", [linear({**FP8, "strategy": "tensor"})], {}),
    "fp8 static": ("fp8-tensor-static-tensor", [linear({**FP8, "strategy": "tensor"}, STATIC)], {}),
    "fp8 block": (
        "fp8-128x128-dynamic-group",
        [
            linear(
                {**FP8, "strategy": "block", "block_structure": [128, 128]},
                {**TOKEN, "strategy": "group", "group_size": 128},
            )
        ],
        {"ignore": ("re:.*self_attn.*",)},
    ),
    "by name": ("w4-g32-sym", [linear(INT4, None, "model.layers.0.mlp.up_proj", "re:.*q_proj$")], {}),
    "ignored": ("w4-g32-sym", [linear(INT4)], {"ignore": ("re:.*layers.0.mlp.*", "model.layers.1.mlp.up_proj")}),
}
COUNTS = {"fp8 block": 6, "by name": 3, "ignored": 10}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_compressed_tensors_gives_its_weights_and_logits(tmp_path: Path, name: str) -> None:
    label, groups, options = FOLDERS[name]
    folder = theirs(tmp_path, *groups, **options)
    assert labels(folder) == {label}
    wanted = dequantized(folder)
    assert len(wanted) == COUNTS.get(name, ALL)
    model = load_theirs(folder)
    model(torch.zeros(1, 1, dtype=torch.int64))
    for module, weight in wanted.items():
        np.testing.assert_array_equal(weight, model.get_submodule(module).weight.detach().numpy())
    with torch.no_grad():
        for module, x, found in our_linears(folder):
            torch.testing.assert_close(found, model.get_submodule(module)(x[None])[0], rtol=1e-4, atol=1e-4)
    # Where inputs are rounded, another order of a sum can move one by a whole step.
    assert_same_logits(folder, folder, **({"tolerance": 0.1} if "static" in label or "dynamic" in label else {}))


@pytest.mark.parametrize(
    ("label", "weights"),
    [
        ("w4-g32-asym", {**INT4, "symmetric": False}),
        ("w4-channel-asym", {**INT4, "symmetric": False, "strategy": "channel", "group_size": None}),
        ("mxfp4-g32", {**INT4, "type": "float", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}),
        (
            "nvfp4-g16",
            {**INT4, "type": "float", "strategy": "tensor_group", "group_size": 16}
            | {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"},
        ),
    ],
)
def test_what_transformers_expands_in_bf16(tmp_path: Path, label: str, weights: dict[str, Any]) -> None:
    folder = theirs(tmp_path, linear(weights))
    assert labels(folder) == {label}
    model = load_theirs(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    for module, weight in dequantized(folder).items():
        found = model.get_submodule(module).weight.detach().numpy()
        # nvfp4 divides its scales in another order than it multiplies.
        assert np.abs(weight - found).max() <= 2.0**-7 * np.abs(weight).max()
        if "nvfp4" not in label:
            np.testing.assert_array_equal(weight.astype(ml_dtypes.bfloat16).astype(np.float32), found)


def test_the_nvfp4_preset_is_read_with_the_rounding_of_its_inputs(tmp_path: Path) -> None:
    folder = theirs(tmp_path, {"targets": ["Linear"], **PRESET_SCHEMES["NVFP4"]})
    assert labels(folder) == {"nvfp4-g16-dynamic-group"}
    args, above = PRESET_SCHEMES["NVFP4"]["input_activations"], torch.tensor([300.0])
    for name, rounder in load_block(open_checkpoint(folder), 0).rounders.items():
        width = open_checkpoint(folder).config.linear_shapes(0)[name][1]
        x = torch.randn(3, 20, width, generator=torch.Generator().manual_seed(0)) * 2
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), above)
        assert torch.equal(rounder(x), fake_quantize(x, scale, zero, args, above))


def test_mixed_precision_has_a_format_for_each_group(tmp_path: Path) -> None:
    groups = linear(INT4), linear(FP8, TOKEN, "re:.*down_proj$"), linear(INT8, None, "model.layers.0.mlp.up_proj")
    folder = theirs(tmp_path, *groups)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "mixed-precision"
    schemes = open_checkpoint(folder).schemes
    assert schemes["model.layers.1.mlp.down_proj"].label == "fp8-channel-dynamic-token"
    assert schemes["model.layers.0.mlp.up_proj"].label == "w8-channel-sym"
    assert schemes["model.layers.1.mlp.up_proj"].label == "w4-g32-sym"
    assert_same_logits(folder, folder, tolerance=0.1)


def test_older_folders_have_an_order_and_byte_zero_points(tmp_path: Path) -> None:
    folder = theirs(tmp_path, linear({**INT4, "symmetric": False}))
    before = open_checkpoint(folder)
    tensors = {name: before.read(name) for name in before.files}
    order = np.random.default_rng(0).permutation(np.arange(128, dtype=np.int32) // 32)
    module = "model.layers.0.mlp.up_proj"
    tensor = before.linear(module)
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.zeros is not None
    tensors[f"{module}.weight_zero_point"] = (tensor.zeros.astype(np.int16) - 8).astype(np.int8)
    tensors[f"{module}.weight_g_idx"] = order
    tensors["model.layers.1.mlp.up_proj.weight_g_idx"] = np.full(128, -1, np.int32)
    write_checkpoint(folder, dict(before.raw_config), tensors)
    after = open_checkpoint(folder)
    assert after.reordered == {module}
    codes = tensor.codes.astype(np.float32) - tensor.zeros[:, order]
    np.testing.assert_array_equal(dequantized(folder)[module], codes * tensor.scales32[:, order])


UNTIED = {**WIDE, "tie_word_embeddings": False}


@pytest.mark.parametrize("weights", [INT4, {**INT8, "num_bits": 8}], ids=["w4 g32", "w8 channel"])
def test_a_quantized_head_gives_their_logits(tmp_path: Path, weights: dict[str, Any]) -> None:
    folder = theirs(tmp_path, linear(weights), config=UNTIED)
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.schemes) == 15
    assert checkpoint.schemes["lm_head"] == checkpoint.schemes["model.layers.0.self_attn.q_proj"]
    assert_same_logits(folder, folder)


def test_a_quantized_embedding_gives_their_weights(tmp_path: Path) -> None:
    """transformers cannot load such a folder again; compressed-tensors unpacks its tensors all the same."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = linear(INT4, None, "Embedding", "Linear")
    folder = theirs(tmp_path, group, config=UNTIED, dtype=torch.float32)
    checkpoint, prefix = open_checkpoint(folder), "model.embed_tokens."
    assert len(checkpoint.schemes) == 16
    stored = {n.removeprefix(prefix): torch.from_numpy(checkpoint.read(n)) for n in checkpoint.files if prefix in n}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    wanted = compressor.decompress(stored, QuantizationScheme.model_validate(group))["weight"]
    np.testing.assert_array_equal(dequantized(folder)["model.embed_tokens"], wanted.numpy())
