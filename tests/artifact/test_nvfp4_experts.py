"""NVFP4 mixtures of experts: what the folder says, what other tools read in it, and where it goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.gguf import Options, export_gguf
from qwen3_export.ship.onnx import export_onnx, write_graph
from qwen3_export.ship.onnx.target import Files, choose
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.parser import check_graph
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.artifact.support import logits, mean_kl, random_ids, tiny_with_tokenizer
from tests.artifact.test_tensorrt_nvfp4 import computed
from tests.conftest import tiny_moe_config, write_checkpoint

CONFIG = tiny_moe_config(hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_experts=4)
RECIPES = {"nvfp4-w4a16": "nvfp4-g16", "nvfp4-w4a4": "nvfp4-g16-dynamic-group"}
IDS = random_ids(40)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    return tiny_with_tokenizer(tmp_path_factory.mktemp("nvfp4") / "moe", reference_folder, CONFIG)


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: pytest.FixtureRequest, original: Path) -> Checkpoint:
    """The model in a shipped recipe, whose calibration reaches every expert a little."""
    output = original.parent / request.param
    settings = QuantizeSettings(samples=4, sequence_length=64, threads=1)
    quantize(open_checkpoint(original), load_recipe(request.param), output, settings)
    return open_checkpoint(output)


def tensors_of(folder: Checkpoint) -> dict[str, QuantizedTensor]:
    found = {name: folder.linear(name) for name in folder.schemes}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, QuantizedTensor)}


def test_every_expert_is_there_and_near_the_original(folder: Checkpoint, original: Path) -> None:
    source, tensors = open_checkpoint(original), tensors_of(folder)
    assert set(tensors) == set(source.config.all_linears())
    assert {tensor.scheme.label for tensor in tensors.values()} == {RECIPES[folder.name]}
    for name, tensor in tensors.items():
        wanted = np.asarray(source.linear(name)).astype(np.float32)
        error = np.linalg.norm(dequantize(tensor) - wanted) / np.linalg.norm(wanted)
        assert 0.01 < error < 0.25, (name, error)
        assert (tensor.input_scale is not None) == (folder.name == "nvfp4-w4a4")
        # Runtimes that run gate and up as one matrix multiply both by one number, and round one input.
        if name.endswith("gate_proj"):
            other = tensors[name.replace("gate_proj", "up_proj")]
            assert (tensor.global_scale, tensor.input_scale) == (other.global_scale, other.input_scale)
    routers = [name for name in folder.files if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(folder.read(name).tobytes() == source.read(name).tobytes() for name in routers)


def test_compressed_tensors_reads_the_experts(folder: Checkpoint) -> None:
    config = json.loads((folder.folder / "config.json").read_text())["quantization_config"]
    assert any(re.match(name.removeprefix("re:"), "model.layers.1.mlp.gate") for name in config["ignore"])
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if ".experts." in name}
    assert len(tensors) == 2 * 4 * 3
    for name, tensor in tensors.items():
        parts = {
            file.removeprefix(f"{name}."): folder.read(file) for file in folder.files if file.startswith(f"{name}.")
        }
        state = {part: as_torch(array) for part, array in parts.items()}
        theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
        np.testing.assert_allclose(theirs, dequantize(tensor), rtol=2.0**-7, atol=0)


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def test_transformers_computes_the_folders_logits_from_its_weights(folder: Checkpoint, tmp_path: Path) -> None:
    """With inputs in 16 bits; where they are rounded, what is left is what rounding them costs."""
    weights = {f"{name}.weight": dequantize(tensor) for name, tensor in tensors_of(folder).items()}
    plain = {name: folder.read(name).astype(np.float32) for name in set(folder.config.tensor_shapes()) - set(weights)}
    dense = write_checkpoint(
        tmp_path / "dense", {**CONFIG, "vocab_size": folder.config.vocab_size}, {**plain, **weights}
    )
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    kl = mean_kl([theirs], logits(folder.folder, [IDS]))
    assert kl < 1e-9 if folder.name == "nvfp4-w4a16" else 1e-3 < kl < 1


def test_tensorrts_graph_computes_the_folders_logits(folder: Checkpoint, tmp_path: Path) -> None:
    """In fp32, by the definitions of its operators."""
    target = replace(choose("standard", precision="fp32"), flavor="tensorrt")
    (tmp_path / "onnx").mkdir()
    write_graph(folder, tmp_path / "onnx", target, Files(), Progress())
    check_graph(tmp_path / "onnx")
    assert mean_kl(logits(folder.folder, [IDS]), [computed(tmp_path / "onnx", IDS, np.float32)]) < 1e-9


def test_tensorrt_builds_a_plan_of_it(folder: Checkpoint, tmp_path: Path) -> None:
    result = export_tensorrt(folder, tmp_path / "trt", capabilities=("12.0",))
    assert (tmp_path / "trt" / "model.plan").stat().st_size > 100_000
    assert {item["name"] for item in result["inexact_tensors"]} >= set(folder.schemes)
    assert max(item["max_rel_error"] for item in result["inexact_tensors"]) < 1.5e-3


def test_where_it_does_not_go_it_is_refused_by_name(folder: Checkpoint, tmp_path: Path) -> None:
    exports: dict[str, Callable[[], Any]] = {
        "cannot be exported to GGUF": lambda: export_gguf(folder, tmp_path / "m.gguf"),
        "its 4-bit floats have no exact place there": lambda: export_onnx(folder, tmp_path / "ort"),
        "runs in no ONNX runtime on a CPU": lambda: export_onnx(folder, tmp_path / "standard", "standard"),
        "have no exact place": lambda: export_onnx(folder, tmp_path / "web", target="web"),
        "--sm 8.9 has no kernels for nvfp4": lambda: export_tensorrt(folder, tmp_path / "trt", capabilities=("8.9",)),
    }
    for reason, export in exports.items():
        with pytest.raises(UnsupportedError, match=reason) as caught:
            export()
        assert caught.value.hint
        assert "--sm" in reason or "layers.0." in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_llama_cpp_runs_it_when_it_may_be_rounded_again(folder: Checkpoint, tmp_path: Path) -> None:
    """In q8_0; the rounding of inputs stays behind, so the weights alone are the measure."""
    result = export_gguf(folder, tmp_path / "m.gguf", options=Options(allow_requantize=True))
    assert {item["to"] for item in result["requantized"]} == {"q8_0"}
    assert len(result["requantized"]) == len(folder.schemes)
    kl = mean_kl(logits(folder.folder, [IDS]), logits(tmp_path / "m.gguf", [IDS]))
    assert kl < (1e-2 if folder.name == "nvfp4-w4a16" else 1)
