"""Broken and unusual folders of compressed-tensors: one CheckpointError that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.layouts import layout
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from tests.conftest import random_tensors, tiny_moe_config, write_checkpoint
from tests.reference import packers
from tests.unit.core.broken_folders import Q_PROJ, WIDE, Edit, add, drop, put, refuses, say


def compressed(folder: Path, scheme: QuantScheme, config: dict[str, Any] | None = None) -> packers.Folder:
    """A folder of compressed-tensors, packed by our layout, without our manifest."""
    chosen, random, config = layout("compressed-tensors"), np.random.default_rng(0), config or WIDE
    parsed = parse_config(config, "test")
    tensors = random_tensors(parsed)
    for name, shape in parsed.all_linears().items():
        codes, grid = random.integers(0, scheme.max_code // 2, shape, np.uint8), scheme.grid(shape)
        scales = (random.integers(128, 256, grid) * 2.0**-13).astype(SCALE_TYPES[scheme.scale_dtype])
        zeros = None if scheme.symmetric else random.integers(0, scheme.max_code + 1, grid, np.uint8)
        fixed = 0.5 if scheme.has_input_scale else None
        del tensors[f"{name}.weight"]
        scaled = {"input_scale": fixed, "global_scale": 2.0 if scheme.scale_dtype == "e4m3" else None}
        tensors.update(chosen.pack(QuantizedTensor(name, shape, scheme, codes, scales, zeros, **scaled)))
    schemes = dict.fromkeys(parsed.all_linears(), scheme)
    return packers.Folder(folder, tensors).write(chosen.config(schemes, list(schemes)), config)


def group(**values: Any) -> Edit:
    return lambda config, _: config["config_groups"]["group_0"].update(values)


def weights(**values: Any) -> Edit:
    return lambda config, _: config["config_groups"]["group_0"]["weights"].update(values)


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
NVFP4 = QuantScheme(4, "float", group_size=16, scale_dtype="e4m3", activations="dynamic-group")
LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("weight_packed", lambda a: a[:-1]), "q_proj.weight_packed has shape"),
        (put("weight_packed", lambda a: a.view(np.uint8)), "q_proj.weight_packed has shape"),
        (put("weight_scale", lambda a: a[:, :1]), "q_proj.weight_scale has shape"),
        (put("weight_scale", lambda a: a.view(np.int16)), "q_proj.weight_scale is stored as int16"),
        (put("weight_zero_point", lambda a: a.T), "q_proj.weight_zero_point has shape"),
        (drop("weight_packed"), "q_proj.weight_packed .* is missing"),
        (drop("weight_zero_point"), "q_proj.weight_zero_point .* is missing"),
        (add(f"{Q_PROJ}.weight_g_idx", np.full(128, 4, np.int32)), "weight_g_idx: it puts inputs into the groups 4 to"),
        (add(f"{Q_PROJ}.weight_g_idx", np.zeros(7, np.int32)), "weight_g_idx has shape"),
        (add("lm_head.weight_packed", np.zeros((4, 4), np.int32)), "lm_head is quantized"),
        (add("model.layers.0.self_attn.k_scale", np.ones(1, np.float32)), "k_scale: the key/value cache is quantized"),
        (say(format="marlin-24"), "group_0 has format 'marlin-24'; one of pack-quantized"),
        (say(format=None), "group_0 has format None"),
        (
            say(format="mixed-precision", config_groups={}),
            "quantized by compressed-tensors, as it says, but every linear",
        ),
        (group(format="mxfp6-quantized"), "group_0 has format 'mxfp6-quantized'"),
        (group(output_activations=TOKEN), "group_0 has output_activations"),
        (group(input_activations={**TOKEN, "type": "float"}), "group_0 rounds inputs by .num_bits: 8, type: float"),
        (group(targets=["re:["]), "a malformed quantization_config"),
        (group(targets=[3]), "a malformed quantization_config"),
        (group(targets=["re:.*k_proj"]), "q_proj.weight .* is missing"),
        (say(ignore=["lm_head", "re:.*q_proj"]), "q_proj.weight .* is missing"),
        (say(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set, which is not supported"),
        (say(transform_config={"config_groups": {"R1": {}}}), "transform_config is set"),
        (say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config has format 'sparse-24-bitmask'"),
        (say(config_groups=None), "a malformed quantization_config"),
        (say(config_groups={"W4A16": ["Linear"]}), "a malformed quantization_config"),
        (lambda config, _: config.pop("config_groups"), "a malformed quantization_config"),
        (weights(num_bits=6), r"group_0: scheme has num_bits: 6; one of \[2, 3, 4, 8\]"),
        (weights(strategy="attn_head"), "group_0: scheme has strategy: 'attn_head'"),
        (weights(group_size=48), "128 inputs are not divisible by group_size 48"),
        (weights(type="float", symmetric=True), "q_proj.weight_packed has shape"),
    ],
)
def test_compressed_tensors(tmp_path: Path, edit: Edit, message: str) -> None:
    refuses(compressed(tmp_path / "ct", QuantScheme(group_size=32, symmetric=False)), edit, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("weight", lambda a: a.view(np.uint8)), "q_proj.weight is stored as uint8; int8 was expected"),
        (put("weight", lambda a: a.astype(ml_dtypes.bfloat16)), "q_proj.weight is stored as bfloat16; int8"),
        (drop("input_scale"), "q_proj.input_scale .* is missing"),
        (put("input_scale", lambda a: a.repeat(3)), "q_proj.input_scale has shape"),
        (add(f"{Q_PROJ}.weight_zero_point", np.ones((128, 1), np.int8)), "q_proj.weight_zero_point: it is not zero"),
        (add(f"{Q_PROJ}.input_zero_point", np.ones(1, np.int8)), "q_proj.input_zero_point: it is not zero"),
        (group(input_activations={**TOKEN, "symmetric": False}), "group_0 rounds inputs by"),
        (group(input_activations={**TOKEN, "strategy": "tensor"}), "group_0 rounds inputs by"),
        (group(input_activations={**TOKEN, "num_bits": 4}), "group_0 rounds inputs by"),
    ],
)
def test_compressed_tensors_of_whole_bytes(tmp_path: Path, edit: Edit, message: str) -> None:
    scheme = QuantScheme(num_bits=8, strategy="channel", activations="static-tensor")
    refuses(compressed(tmp_path / "ct", scheme), edit, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("input_global_scale"), "q_proj.input_global_scale .* is missing"),
        (put("input_global_scale", lambda a: a.repeat(3)), "q_proj.input_global_scale has shape"),
        (
            put("input_global_scale", lambda a: a * 0),
            "q_proj.input_global_scale is 0.0, a positive number was expected",
        ),
        (put("input_global_scale", lambda a: -a), "q_proj.input_global_scale is -2.0, a positive number"),
        (group(input_activations={**LOCAL, "dynamic": True}), "group_0 rounds inputs by"),
        (group(input_activations={**LOCAL, "strategy": "tensor"}), "group_0 rounds inputs by"),
        (group(input_activations={**LOCAL, "group_size": 32}), "group_0 rounds inputs by"),
        (group(input_activations={**LOCAL, "num_bits": 8}), "group_0 rounds inputs by"),
    ],
)
def test_compressed_tensors_of_nvfp4_inputs(tmp_path: Path, edit: Edit, message: str) -> None:
    refuses(compressed(tmp_path / "ct", NVFP4), edit, message)


def test_zero_points_of_zeros_and_scalars_are_taken_as_older_releases_wrote_them(tmp_path: Path) -> None:
    scheme = QuantScheme(num_bits=8, strategy="channel", activations="static-tensor")
    folder = compressed(tmp_path / "ct", scheme)
    before = open_checkpoint(folder.path).linear(Q_PROJ)
    folder.tensors[f"{Q_PROJ}.weight_zero_point"] = np.zeros((128, 1), np.int8)
    folder.tensors[f"{Q_PROJ}.input_zero_point"] = np.zeros(1, np.int8)
    folder.tensors[f"{Q_PROJ}.input_scale"] = np.array(0.5, np.float32)
    folder.tensors[f"{Q_PROJ}.weight_scale"] = folder.tensors[f"{Q_PROJ}.weight_scale"][:, 0]
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    after = open_checkpoint(folder.path).linear(Q_PROJ)
    assert isinstance(before, QuantizedTensor)
    assert isinstance(after, QuantizedTensor)
    assert (after.scheme, after.input_scale) == (before.scheme, before.input_scale)
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.scales, before.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_in_bytes_without_rounded_inputs(tmp_path: Path, bits: int) -> None:
    folder = compressed(tmp_path / "ct", QuantScheme(num_bits=bits, strategy="channel"))
    before = open_checkpoint(folder.path).linear(Q_PROJ)
    assert isinstance(before, QuantizedTensor)
    del folder.tensors[f"{Q_PROJ}.weight_packed"], folder.tensors[f"{Q_PROJ}.weight_shape"]
    folder.tensors[f"{Q_PROJ}.weight"] = (before.codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    after = open_checkpoint(folder.path).linear(Q_PROJ)
    assert isinstance(after, QuantizedTensor)
    np.testing.assert_array_equal(after.codes, before.codes)


def test_a_router_that_is_quantized_is_refused_and_one_that_is_not_is_read(tmp_path: Path) -> None:
    config = tiny_moe_config(hidden_size=64, moe_intermediate_size=64)
    folder = compressed(tmp_path / "moe", QuantScheme(group_size=32), config)
    assert len(open_checkpoint(folder.path).schemes) == 2 * (4 + 3 * 8)
    name = "model.layers.0.mlp.gate"
    refuses(folder, add(f"{name}.weight_scale", np.ones((8, 2), np.float16)), f"{name} is quantized")
