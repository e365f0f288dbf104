"""Folders that other tools quantized: what they mean by their owners is what we read, run and export.

compressed-tensors folders are written by compressed-tensors and transformers, and loaded by them;
GPTQ, AWQ and FP8 folders are written by plain loops after their owners' layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
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
from qwen3_export.errors import InputError, UnsupportedError
from qwen3_export.model.decoder import load_block
from qwen3_export.ship import tensorrt
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import (
    VOCABULARY,
    OnnxWeights,
    gguf_name,
    gguf_tensors,
    read_blocks,
    with_tokenizer,
)
from tests.artifact.test_onnx_ort import read_matmul
from tests.conftest import cli, tiny_config, write_checkpoint
from tests.reference import packers
from tests.reference.models import assert_same_logits, dequantized, load_theirs

WIDE = tiny_config(hidden_size=128, intermediate_size=256)
ALL = 14
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


def labels(folder: Path) -> set[str]:
    return {scheme.label for scheme in open_checkpoint(folder).schemes.values()}


def assert_means(folder: packers.Folder, config: dict[str, Any] | None = None) -> None:
    """Every weight is its owner's, and so are the logits of transformers' own forward pass."""
    found = dequantized(folder.path)
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, folder.weights[name], name)
    if not any(scheme.activations for scheme in open_checkpoint(folder.path).schemes.values()):
        assert_same_logits(folder.path, folder.dense(config))


# GPTQ


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("w4-g32-sym", {"midpoint": True}),
        ("w4-g32-asym", {}),
        ("w4-g32-asym", {"v2": True}),
        ("w4-channel-sym", {"group": -1, "midpoint": True}),
        ("w2-g16-asym", {"bits": 2, "group": 16}),
        ("w3-g32-asym", {"bits": 3}),
        ("w8-channel-asym", {"bits": 8, "group": -1, "index": False}),
        ("w8-g32-sym", {"bits": 8, "midpoint": True, "v2": True, "scales": ml_dtypes.bfloat16}),
        ("w4-g32-asym", {"order": True, "scales": np.float32}),
        ("w4-g16-sym", {"group": 16, "order": True, "midpoint": True}),
    ],
    ids=str,
)
def test_a_gptq_folder_means_what_its_owner_says(tmp_path: Path, label: str, options: dict[str, Any]) -> None:
    folder = packers.gptq(tmp_path / "gptq", **options)
    checkpoint = open_checkpoint(folder.path)
    assert labels(folder.path) == {label}
    assert len(checkpoint.schemes) == ALL
    assert len(checkpoint.reordered) == (ALL if options.get("order") else 0)
    assert_means(folder)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_takes_one_off_whole_words(tmp_path: Path, bits: int) -> None:
    meta = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    folder = packers.gptq(tmp_path / "gptq", bits, borrow=True, **meta)
    assert any((zeros == 0).any() for zeros in folder.zeros.values())
    assert_means(folder)


@pytest.mark.parametrize("sym", [True, False])
def test_the_stored_zero_points_say_whether_it_is_symmetric(tmp_path: Path, sym: bool) -> None:
    assert labels(packers.gptq(tmp_path / "asym", sym=sym).path) == {"w4-g32-asym"}
    assert labels(packers.gptq(tmp_path / "sym", midpoint=True, sym=sym).path) == {"w4-g32-sym"}


def test_autogptq_wrote_its_configuration_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq")
    values = json.loads((folder.path / "config.json").read_text())
    said = values.pop("quantization_config")
    (folder.path / "config.json").write_text(json.dumps(values))
    (folder.path / "quantize_config.json").write_text(
        json.dumps({key: said[key] for key in ("bits", "group_size", "sym", "desc_act")})
    )
    assert_means(folder)
    assert "quantize_config.json" not in [path.name for path in open_checkpoint(folder.path).sidecars()]


def test_a_bias_of_zeros_is_none(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq")
    for name, weight in folder.weights.items():
        folder.tensors[f"{name}.bias"] = np.zeros(len(weight), np.float16)
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert_means(folder)


def test_negative_scales_are_known(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq", midpoint=True)
    name = next(iter(folder.weights))
    folder.tensors[f"{name}.scales"] = -folder.tensors[f"{name}.scales"]
    folder.weights[name] = -folder.weights[name]
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert labels(folder.path) == {"w4-g32-signed"}
    assert_means(folder)


def test_dynamic_rules_of_gptqmodel(tmp_path: Path) -> None:
    rules = {r"+:.*\.down_proj": {"bits": 8, "group_size": 16}, r"-:.*\.0\.self_attn": {}, r".*o_proj": {"sym": False}}
    folder = packers.gptq(tmp_path / "four", midpoint=True, dynamic=rules)
    eight = packers.gptq(tmp_path / "eight", 8, 16, midpoint=True)
    for source, target in ((eight, "down_proj"), (None, ".0.self_attn")):
        for name in [n for n in folder.weights if target in n]:
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del folder.tensors[f"{name}.{part}"]
            if source is None:
                folder.tensors[f"{name}.weight"] = folder.weights[name]
            else:
                folder.tensors.update({n: a for n, a in source.tensors.items() if n.startswith(f"{name}.")})
                folder.weights[name] = source.weights[name]
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert labels(folder.path) == {"w4-g32-sym", "w8-g16-sym"}
    assert len(open_checkpoint(folder.path).schemes) == ALL - 4
    assert_means(folder)


# AWQ and FP8


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("w4-g32-asym", {}),
        ("w4-g32-sym", {"midpoint": True, "version": "GEMM"}),
        ("w4-channel-asym", {"group": -1, "modules_to_not_convert": ["lm_head"]}),
    ],
    ids=str,
)
def test_an_awq_folder_means_what_its_owner_says(tmp_path: Path, label: str, options: dict[str, Any]) -> None:
    folder = packers.awq(tmp_path / "awq", **options)
    assert labels(folder.path) == {label}
    assert_means(folder)


@pytest.mark.parametrize("scales", [ml_dtypes.bfloat16, np.float32])
def test_an_official_fp8_folder_means_what_its_owner_says(tmp_path: Path, scales: Any) -> None:
    folder = packers.fp8(tmp_path / "fp8", WIDE, scales=scales, plain="o_proj")
    checkpoint = open_checkpoint(folder.path)
    assert labels(folder.path) == {"fp8-128x128-dynamic-group"}
    assert len(checkpoint.schemes) == ALL - 2
    assert_means(folder)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        parts = x.reshape(len(x), -1, 128)
        scale = parts.abs().amax(-1, keepdim=True) / 448
        return ((parts / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)

    for name, x, found in our_linears(folder.path):
        wanted = (x if "o_proj" in name else rounded(x)) @ torch.from_numpy(folder.weights[name]).T
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def our_linears(folder: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, random inputs and our outputs of every linear of the first block."""
    checkpoint, random, found = open_checkpoint(folder), torch.Generator().manual_seed(0), []
    block = load_block(checkpoint, 0)
    for name, (_, inputs) in checkpoint.config.linear_shapes(0).items():
        x = torch.randn(5, inputs, generator=random)
        rounder = block.rounders.get(name, lambda x: x)
        found.append((f"model.layers.0.{name}", x, rounder(x) @ block.weights[name].T))
    return found


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


# Exports


@pytest.fixture
def shipped(tmp_path: Path, reference_folder: Path) -> Callable[..., packers.Folder]:
    """A folder with a tokenizer, as GGUF needs one."""
    config = tiny_config(vocab_size=VOCABULARY, max_position_embeddings=512)

    def make(pack: Callable[..., packers.Folder], **options: Any) -> packers.Folder:
        folder = pack(tmp_path / "foreign", config=config, **options)
        with_tokenizer(folder.path, reference_folder)
        return folder

    return make


@pytest.mark.parametrize("pack", [packers.gptq, packers.awq])
@pytest.mark.parametrize("midpoint", [True, False])
def test_codes_arrive_in_onnx_and_gguf(
    shipped: Callable[..., packers.Folder], tmp_path: Path, pack: Callable[..., packers.Folder], midpoint: bool
) -> None:
    folder = shipped(pack, midpoint=midpoint)
    checkpoint = open_checkpoint(folder.path)
    export_onnx(checkpoint, tmp_path / "onnx")
    export_gguf(checkpoint, tmp_path / "model.gguf")
    weights, blocks = OnnxWeights(tmp_path / "onnx"), gguf_tensors(tmp_path / "model.gguf")
    for name, codes in folder.codes.items():
        found, _, zeros = read_matmul(weights, name)
        np.testing.assert_array_equal(found, codes)
        if not midpoint:
            np.testing.assert_array_equal(zeros, folder.zeros[name])
        stored = blocks[gguf_name(name)]
        kind = gguf.GGMLQuantizationType.Q4_0 if midpoint else gguf.GGMLQuantizationType.Q4_1
        assert stored.tensor_type == kind
        np.testing.assert_array_equal(read_blocks(stored.data, kind).codes, codes)


def test_an_order_is_refused_by_every_export(shipped: Callable[..., packers.Folder], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shipped(packers.gptq, midpoint=True, order=True).path)
    for export in (
        lambda: export_onnx(checkpoint, tmp_path / "onnx"),
        lambda: export_onnx(checkpoint, tmp_path / "onnx", "standard"),
        lambda: export_gguf(checkpoint, tmp_path / "model.gguf"),
        lambda: tensorrt.check_request(checkpoint, "rtx", ["8.9"], "fp16"),
    ):
        with pytest.raises(UnsupportedError, match="its groups are not consecutive inputs") as caught:
            export()
        assert "gptq-w4a16-g128" in str(caught.value.hint)
    assert not (tmp_path / "onnx").exists()


def test_the_command_line_reads_such_a_folder(shipped: Callable[..., packers.Folder], tmp_path: Path) -> None:
    folder = shipped(packers.gptq, order=True).path
    inspected = json.loads(cli("inspect", folder, "--json").stdout)
    assert inspected["quantized"] == {"w4-g32-asym": ALL}
    validated = cli("validate", folder, "--reference", folder, "--tokens", "300", "--json")
    assert validated.returncode == 0, validated.stderr
    assert abs(json.loads(validated.stdout)["results"][0]["kl_mean"]) < 1e-6
    again = cli("quantize", folder, "--recipe", "rtn-w4a16-g128", "--output", tmp_path / "again")
    assert again.returncode == InputError.exit_code
    assert "is quantized already" in again.stderr


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
