"""Folders as ModelOpt and AutoRound write them: weights by their owners' formulas, logits by transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import CheckpointError, InputWarning
from qwen3_export.model.decoder import Decoder, load_block
from qwen3_export.ship.tensorrt import export_tensorrt
from tests.artifact.support import load_graph
from tests.cli.helpers import call
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint
from tests.reference import packers

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
INPUT_SCALE = np.float32(0.02)
EXPERTS = "model.layers.1.mlp.experts"
IDS = np.arange(3, 67, 3, dtype=np.int32)


def _modelopt(
    path: Path,
    algorithm: str,
    inputs: bool,
    *,
    cache: bool = False,
    file: str = "both",
    config: dict[str, Any] | None = None,
) -> packers.Folder:
    """A folder as ModelOpt's unified export writes it; scales are scalars, `file` says where the configuration is."""
    random, (folder, linears) = np.random.default_rng(0), packers._start(path, config)
    for number, (name, (out, width)) in enumerate(linears.items()):
        if algorithm == "FP8":
            codes = random.standard_normal((out, width)).astype(ml_dtypes.float8_e4m3fn)
            scale = np.float32(0.01 + 0.001 * number)
            folder.tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": np.array(scale)}
            folder.weights[name] = codes.astype(np.float32) * scale
        else:
            codes = random.integers(0, 16, (out, width), np.uint8)
            scales = random.uniform(16, 400, (out, width // 16)).astype(ml_dtypes.float8_e4m3fn)
            shared = np.float32(2.0 ** -(12 + number % 3))
            folder.tensors |= {
                f"{name}.weight": codes[:, ::2] | codes[:, 1::2] << 4,
                f"{name}.weight_scale": scales,
                f"{name}.weight_scale_2": np.array(shared),
            }
            folder.weights[name] = E2M1[codes] * np.repeat(scales.astype(np.float32) * shared, 16, 1)
        if inputs:
            folder.tensors[f"{name}.input_scale"] = np.array(INPUT_SCALE, np.float32)
        if cache and name.endswith(("k_proj", "v_proj")):
            folder.tensors[f"{name}.{name[-6]}_scale"] = np.array(1.0, np.float32)
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if cache else None, "exclude_modules": ["lm_head"]}
    folder.write({"quant_method": "modelopt", **said} if file == "both" else None, config)
    values = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": said}
    (path / "hf_quant_config.json").write_text(json.dumps(values))
    return folder


def _logits(folder: Path) -> np.ndarray:
    decoder = Decoder(open_checkpoint(folder))
    return decoder.logits(decoder.hidden([IDS], [decoder.new_caches()])[0]).numpy()


def _theirs(folder: Path) -> np.ndarray:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()


def _check_weights(folder: packers.Folder) -> None:
    checkpoint = open_checkpoint(folder.path)
    assert set(checkpoint.schemes) == set(folder.weights)
    for name, wanted in folder.weights.items():
        tensor = checkpoint.linear(name)
        assert isinstance(tensor, QuantizedTensor)
        np.testing.assert_array_equal(dequantize(tensor), wanted)


@pytest.mark.filterwarnings("ignore::qwen3_export.errors.InputWarning")
@pytest.mark.parametrize("file", ["both", "hf_quant_config"])
@pytest.mark.parametrize(
    ("algorithm", "inputs", "rounded"),
    [
        ("FP8", False, None),
        ("FP8", True, "static-tensor"),
        ("NVFP4", False, None),
        ("NVFP4", True, "dynamic-group"),
    ],
)
def test_modelopt_folders_mean_the_weights_of_their_formula(
    tmp_path: Path, algorithm: str, inputs: bool, rounded: str | None, file: str
) -> None:
    folder = _modelopt(tmp_path / "folder", algorithm, inputs, file=file)
    _check_weights(folder)
    checkpoint = open_checkpoint(folder.path)
    assert {scheme.activations for scheme in checkpoint.schemes.values()} == {rounded}
    scales = {checkpoint.linear(name).input_scale for name in folder.weights}  # type: ignore[union-attr]
    assert scales == {float(INPUT_SCALE) if inputs else None}


@pytest.mark.filterwarnings("ignore::qwen3_export.errors.InputWarning")
@pytest.mark.parametrize(("algorithm", "inputs"), [("FP8", False), ("NVFP4", False)])
def test_modelopt_folders_have_the_logits_of_transformers(tmp_path: Path, algorithm: str, inputs: bool) -> None:
    folder = _modelopt(tmp_path / "folder", algorithm, inputs)
    np.testing.assert_allclose(_logits(folder.path), _theirs(folder.dense()), atol=2e-4)


def test_what_modelopts_runtimes_round_beside_the_weights_is_warned_of(tmp_path: Path) -> None:
    folder = _modelopt(tmp_path / "folder", "FP8", False, cache=True)
    with pytest.warns(InputWarning, match="rounding of the key/value cache"):
        _check_weights(folder)
    assert call("inspect", folder.path).err.count("warning: ") == 1


def test_modelopt_inputs_in_nvfp4_are_rounded_by_its_formula(tmp_path: Path) -> None:
    """Nothing is left out there, so nothing is warned of; a scale that is no positive number is refused."""
    folder = _modelopt(tmp_path / "folder", "NVFP4", True)
    assert "warning" not in call("inspect", folder.path).err
    rounders = load_block(open_checkpoint(folder.path), 0).rounders
    assert len(rounders) == 7
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 3
    groups = x.reshape(5, -1, 16).numpy()
    inner = (np.abs(groups).max(-1, keepdims=True) / np.float32(6) / INPUT_SCALE).clip(max=448)
    scale = inner.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * INPUT_SCALE
    wanted = (groups / scale).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_allclose(rounders["mlp.gate_proj"](x).numpy(), wanted.reshape(5, -1), rtol=1e-6)
    folder.tensors["model.layers.0.mlp.up_proj.input_scale"] = np.array(0, np.float32)
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    with pytest.raises(CheckpointError, match=r"up_proj.input_scale is 0.0, a positive number was expected"):
        open_checkpoint(folder.path).linear("model.layers.0.mlp.up_proj")


def _experts(path: Path, algorithm: str, scale_of: Callable[[int, str], float | None]) -> Path:
    """A mixture of experts with chosen input scales in its second layer; None stores none."""
    folder = _modelopt(path, algorithm, True, config=tiny_moe_config())
    for expert in range(8):
        for linear in ("gate_proj", "up_proj", "down_proj"):
            name = f"{EXPERTS}.{expert}.{linear}.input_scale"
            scale = scale_of(expert, linear)
            folder.tensors.pop(name)
            folder.tensors |= {} if scale is None else {name: np.array(scale, np.float32)}
    return write_checkpoint(path, json.loads((path / "config.json").read_text()), folder.tensors)


def _reached(expert: int, linear: str) -> float:
    return 2.0**-8 * (expert + 1) * (2 if linear == "down_proj" else 1)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_experts_that_calibration_did_not_reach_share_their_layers_largest_input_scale(
    tmp_path: Path, algorithm: str
) -> None:
    """ModelOpt stores 0 for them, or nothing; TensorRT-LLM uses the largest scale for all experts of a layer."""

    def stored(expert: int, linear: str) -> float | None:
        return {2: 0.0, 5: None}.get(expert, _reached(expert, linear))

    def shared(expert: int, linear: str) -> float:
        return _reached(7 if expert in (2, 5) else expert, linear)

    folder = _experts(tmp_path / "unreached", algorithm, stored)
    checkpoint, told = open_checkpoint(folder), _experts(tmp_path / "told", algorithm, shared)
    assert checkpoint.schemes == open_checkpoint(told).schemes
    with pytest.warns(InputWarning, match="no token of calibration reached"):
        found = _logits(folder)
    np.testing.assert_array_equal(found, _logits(told))
    with warnings.catch_warnings(action="ignore"):
        scales = {
            (expert, linear): checkpoint.linear(f"{EXPERTS}.{expert}.{linear}").input_scale  # type: ignore[union-attr]
            for expert in range(8)
            for linear in ("gate_proj", "up_proj", "down_proj")
        }
    assert scales == {key: shared(*key) for key in scales}


def test_experts_whose_layer_has_no_input_scale_at_all(tmp_path: Path) -> None:
    """Zeros alone say nothing; where none is stored, inputs are not rounded; a negative one is damage."""
    zeros = open_checkpoint(_experts(tmp_path / "zeros", "NVFP4", lambda expert, linear: 0.0))
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.input_scale is 0.0, a positive number was expected"):
        zeros.linear(f"{EXPERTS}.3.up_proj")
    none = open_checkpoint(_experts(tmp_path / "none", "NVFP4", lambda expert, linear: None))
    assert none.schemes[f"{EXPERTS}.3.up_proj"].activations is None
    assert none.schemes[f"{EXPERTS.replace('1', '0')}.3.up_proj"].activations == "dynamic-group"
    wrong = open_checkpoint(_experts(tmp_path / "negative", "NVFP4", lambda expert, linear: 1.0 - expert))
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.input_scale is -2.0, a positive number"):
        wrong.linear(f"{EXPERTS}.3.up_proj")


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_modelopt_folders_become_tensorrt_plans_graphs(tmp_path: Path, algorithm: str) -> None:
    """Their scales are scalars of fp32, which 16 bits change: by how much is said for each."""
    folder = _modelopt(tmp_path / "folder", algorithm, True)
    checkpoint = open_checkpoint(folder.path)
    result = export_tensorrt(checkpoint, tmp_path / "trt", onnx_only=True)
    operators = [node.op_type for node in load_graph(tmp_path / "trt").graph.node]
    assert operators.count("TRT_FP4DynamicQuantize" if algorithm == "NVFP4" else "QuantizeLinear") == 14
    said = {item["name"]: item["max_rel_error"] for item in result["inexact_tensors"]}
    for name in folder.weights:
        scale = name if algorithm == "NVFP4" else f"{name}.input_scale"
        assert 0 < said[scale] < 2.0**-9
        assert abs(float(np.float16(INPUT_SCALE)) / INPUT_SCALE - 1) <= said[scale]


def test_modelopt_layouts_that_are_not_known_are_refused_and_none_is_written(tmp_path: Path) -> None:
    folder = _modelopt(tmp_path / "folder", "FP8", False)
    values = json.loads((folder.path / "config.json").read_text())
    values["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    (folder.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="quant_algo W4A8_AWQ; FP8 and NVFP4 can be read"):
        open_checkpoint(folder.path)
    plain = write_checkpoint(tmp_path / "plain", tiny_config())
    outcome = call("quantize", plain, "--recipe", "rtn-w4a16-g32", "--layout", "modelopt", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "read and never written" in outcome.err


def _auto_round(folder: packers.Folder, packing: str | None, extra: dict[str, Any] | None = None) -> packers.Folder:
    """The same tensors under AutoRound's configuration."""
    values = json.loads((folder.path / "config.json").read_text())
    old = values["quantization_config"]
    values["quantization_config"] = {
        "quant_method": "auto-round",
        "autoround_version": "0.16.1",
        **{key: old[key] for key in ("bits", "group_size")},
        "sym": bool(old.get("sym")),
        "data_type": "int",
        "iters": 200,
        **({"packing_format": packing} if packing else {}),
        **({"extra_config": extra} if extra else {}),
    }
    write_checkpoint(folder.path, values, folder.tensors)
    return folder


@pytest.mark.parametrize("midpoint", [True, False])
@pytest.mark.parametrize(
    "packing", [None, "auto_round:auto_gptq", "auto_round", "auto_round:gptqmodel", "auto_round:auto_awq"]
)
def test_auto_round_folders_mean_the_weights_of_their_packing(
    tmp_path: Path, packing: str | None, midpoint: bool
) -> None:
    if packing == "auto_round:auto_awq":
        folder = packers.awq(tmp_path / "folder", midpoint=midpoint)
    else:
        whole = packing in ("auto_round", "auto_round:gptqmodel")
        folder = packers.gptq(tmp_path / "folder", v2=whole, midpoint=midpoint, index=False)
    _check_weights(_auto_round(folder, packing))
    assert {scheme.symmetric for scheme in open_checkpoint(folder.path).schemes.values()} == {midpoint}
    np.testing.assert_allclose(_logits(folder.path), _theirs(folder.dense()), atol=2e-4)


def test_a_linear_that_auto_round_left_in_16_bits_is_read(tmp_path: Path) -> None:
    folder, left = packers.gptq(tmp_path / "folder", midpoint=True), "model.layers.0.mlp.down_proj"
    plain = random_tensors(parse_config(tiny_config(), "test"))[f"{left}.weight"]
    folder.tensors = {n: a for n, a in folder.tensors.items() if not n.startswith(left)} | {f"{left}.weight": plain}
    folder.weights.pop(left)
    _check_weights(_auto_round(folder, None, {left: {"bits": 16, "data_type": "float"}}))


@pytest.mark.parametrize(
    "change", [{"packing_format": "auto_round:fp8_static"}, {"data_type": "mx_fp"}, {"extra_config": [1]}]
)
def test_auto_round_in_other_types_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = _auto_round(packers.gptq(tmp_path / "folder", midpoint=True), "auto_round")
    values = json.loads((folder.path / "config.json").read_text())
    values["quantization_config"].update(change)
    (folder.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"AutoRound with packing_format|extra_config"):
        open_checkpoint(folder.path)
