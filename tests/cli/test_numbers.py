"""Numbers that are none, and numbers that a scheme cannot hold: exit 2, the tensor named, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.finite import all_finite
from qwen3_export.core.tensorfile import TensorFile, write_tensors
from tests.cli.helpers import call, names, refused, write_text_model
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

NORM, LINEAR = "model.layers.1.input_layernorm", "model.layers.1.mlp.down_proj"
TENSORS = [NORM, LINEAR, "model.norm", "model.embed_tokens", "model.layers.0.self_attn.q_norm"]
COMMANDS = {
    "rtn": ("quantize", "--recipe", "rtn-w4a16-g32"),
    "gptq": ("quantize", "--recipe", "gptq-w4a16-g32", "--samples", "2", "--sequence-length", "16"),
    "onnx": ("onnx",),
    "fp16": ("onnx", "--precision", "fp16"),
    "gguf": ("gguf",),
    "q8_0": ("gguf", "--type", "q8_0"),
    "reference": ("reference", "--tokens", "64", "--window", "32"),
}


def _change(folder: Path, tensor: str, change: Callable[[NDArray], NDArray]) -> None:
    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {name: file.read(name) for name in file.entries}
    tensors[f"{tensor}.weight"] = change(tensors[f"{tensor}.weight"].copy())
    write_tensors(path, tensors.items())


def _put(value: float) -> Callable[[NDArray], NDArray]:
    def change(array: NDArray) -> NDArray:
        array.reshape(-1)[-1] = value
        return array

    return change


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_one_bad_number_among_many_is_found_wherever_it_stands(dtype: type) -> None:
    array = np.linspace(-3e4, 3e4, 200_000).astype(dtype).reshape(400, 500)
    assert all_finite(array)
    for place in (0, 65_535, 65_536, 131_071, 199_999):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            changed = array.copy()
            changed.reshape(-1)[place] = bad
            assert not all_finite(changed), (dtype, place, bad)
            assert all_finite(changed.astype(np.float32)) == np.isfinite(changed.astype(np.float32)).all()


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("tensor", TENSORS)
def test_no_command_lets_a_tensor_with_nan_pass(tmp_path: Path, command: str, tensor: str) -> None:
    folder = write_text_model(tmp_path / "model")
    _change(folder, tensor, _put(-np.inf if command == "gguf" else np.nan))
    name, *options = COMMANDS[command]
    outcome = call(name, folder, *options, "--output", tmp_path / "out")
    refused(outcome, 2, f"{tensor}.weight: it holds NaN or infinity")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["rtn", "gguf"])
def test_a_router_with_nan_is_refused(tmp_path: Path, command: str) -> None:
    sizes = {"hidden_size": 128, "vocab_size": 8192, "moe_intermediate_size": 64}
    folder = write_text_model(tmp_path / "model", **{**tiny_moe_config(), **sizes})
    _change(folder, "model.layers.0.mlp.gate", _put(np.nan))
    name, *options = COMMANDS[command]
    outcome = call(name, folder, *options, "--output", tmp_path / "out")
    refused(outcome, 2, "model.layers.0.mlp.gate.weight: it holds NaN or infinity")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["onnx", "folder"])
def test_an_artifact_whose_logits_are_no_numbers_is_refused_by_run_and_validate(tmp_path: Path, what: str) -> None:
    folder = write_text_model(tmp_path / "model")
    if what == "folder":
        # Weights that are numbers, and activations that overflow fp32.
        for tensor in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"):
            _change(folder, tensor, lambda array: array * array.dtype.type(1e30))
        artifact = folder
    else:
        artifact = tmp_path / "onnx"
        assert call("onnx", folder, "--output", artifact).code == 0
        size = (artifact / "model.onnx.data").stat().st_size
        (artifact / "model.onnx.data").write_bytes(b"\xff" * size)
    outcome = call("run", artifact, "--prompt", "hello", "--max-new-tokens", "2")
    refused(outcome, 2, "logits holds NaN or infinity")
    if what == "onnx":
        text = tmp_path / "text.txt"
        text.write_text("the ocean is wide and the ship is small; every wave tells of another shore. " * 4)
        outcome = call("validate", artifact, "--reference", write_text_model(tmp_path / "sound"), "--text", text)
        refused(outcome, 2, "NaN or infinity")


def test_activations_that_are_no_numbers_are_not_written_down(tmp_path: Path) -> None:
    """Weights that are numbers, and activations that overflow fp32: neither squares nor scales are made of them."""
    folder = write_text_model(tmp_path / "model")
    for tensor in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"):
        _change(folder, tensor, lambda array: array * array.dtype.type(1e30))
    outcome = call("calibrate", folder, "--samples", "2", "--sequence-length", "32", "--output", tmp_path / "out.gguf")
    refused(outcome, 2, "model.layers.0.mlp.down_proj", "NaN or infinity")
    outcome = call("onnx", folder, "--kv-cache", "int8", "--output", tmp_path / "out")
    refused(outcome, 2, "past_key_values.1.key holds NaN or infinity")
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("command", ["rtn", "gptq"])
def test_a_matrix_that_the_scales_cannot_hold_is_refused_by_name(tmp_path: Path, command: str) -> None:
    folder = write_text_model(tmp_path / "model")
    _change(folder, LINEAR, lambda array: (array.astype(np.float32) * 1e-7).astype(array.dtype))
    name, *options = COMMANDS[command]
    outcome = call(name, folder, *options, "--output", tmp_path / "out")
    refused(outcome, 2, LINEAR, "100%", "scheme: none")
    assert "out" not in names(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: mine\nmethod: rtn\nrules:\n  - {{match: {LINEAR}, scheme: none}}\n"
        "  - {match: '*', scheme: {num_bits: 4, symmetric: true, strategy: group, group_size: 32}}\n"
    )
    kept = call("quantize", folder, "--recipe", recipe, "--output", tmp_path / "out", "--no-resume", "--json")
    assert max(layer["error"] for layer in kept.json["layers"]) < 0.1


@pytest.mark.parametrize("tensor", [LINEAR, NORM])
@pytest.mark.parametrize("scale", [1e-9, 1e-30])
def test_an_export_loses_no_tensor(tmp_path: Path, tensor: str, scale: float) -> None:
    """Numbers below what fp16 holds, and numbers whose squares fp32 does not hold."""
    folder = write_text_model(tmp_path / "model")
    _change(folder, tensor, lambda array: (array.astype(np.float32) * scale).astype(array.dtype))
    commands = [("onnx", "--precision", "fp16"), ("tensorrt", "--onnx-only")]
    if tensor == LINEAR:
        commands += [("gguf", "--type", name) for name in ("f16", "q4_0", "q8_0", "q4_k_m", "iq4_nl")]
    for name, *options in commands:
        refused(call(name, folder, *options, "--output", tmp_path / "out"), 2, f"{tensor}.weight", "power", "bf16")
    assert names(tmp_path) == ["model"]
    for name, *options in (("onnx",), ("gguf",)):
        assert call(name, folder, *options, "--output", tmp_path / f"kept.{name}").code == 0


def test_a_matrix_of_zeros_loses_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    _change(folder, LINEAR, np.zeros_like)
    outcome = call("quantize", folder, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out", "--json")
    assert next(layer["error"] for layer in outcome.json["layers"] if layer["name"] == LINEAR) == 0
    assert call("onnx", folder, "--precision", "fp16", "--output", tmp_path / "onnx").code == 0
    # Its scales in FP8 are the smallest there are, which fp16 stores as 0.
    assert call("quantize", folder, "--recipe", "fp8-dynamic", "--output", tmp_path / "fp8").code == 0
    outcome = call(
        "onnx", tmp_path / "fp8", "--flavor", "standard", "--precision", "fp16", "--output", tmp_path / "fp16"
    )
    assert outcome.code == 0, outcome.err
