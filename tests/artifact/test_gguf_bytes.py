"""What is in a GGUF file, read with gguf-py: 16-bit and q8_0 files are, byte for byte, those of llama.cpp's
convert_hf_to_gguf.py; codes and scales of quantized ones equal the solver's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import (
    GgufFile,
    gguf_name,
    gguf_tensors,
    read_blocks,
    round_to_nearest,
    tiny_with_tokenizer,
    with_tokenizer,
)
from tests.conftest import random_tensors, tiny_config, write_checkpoint

QUANTIZED = {
    "gptq-w4a16-g128": Type.Q4_0,
    "gptq-w4a16-g32": Type.Q4_0,
    "gptq-w4a16-g32-asym": Type.Q4_1,
    "rtn-w8a16": Type.Q8_0,
}
# sha256 of the whole file that convert_hf_to_gguf.py (llama.cpp 0.5.0-dev, `--outtype …`) writes for the
# reference model, its unknown tokenizer hash answered with "qwen2".
CONVERTERS = {
    "bf16": "6615b8a9274bff1cb17c133fbcf2f5bd7331337cbe8580354f7e912ab36c285c",
    "f16": "63c604db8ff7dc39366dc98dc14a1b29c0f945d0953334354fdd27115e4f0624",
    "q8_0": "a9e18cfeb5558edba87ccc1bf95194ed7e39650e2dbf5671e73cce5f3c09e6f8",
}


@pytest.mark.parametrize("type_name", CONVERTERS)
def test_file_is_the_converters(gguf_file: GgufFile, type_name: str) -> None:
    exported = gguf_file("original", type_name)
    assert hashlib.sha256(exported.path.read_bytes()).hexdigest() == CONVERTERS[type_name]
    assert exported.result["files"][0]["sha256"] == CONVERTERS[type_name]


def source_name(name: str) -> str:
    """Hugging Face name of a dense model's GGUF tensor."""
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, layer, local = stem.split(".")
    return f"model.layers.{layer}.{inner[local]}.weight"


def wanted_bytes(array: NDArray, type_name: str) -> bytes:
    """A source tensor as the format asks for it: vectors in fp32, matrices in the file's type."""
    if array.ndim == 1:
        return array.astype(np.float32).tobytes()
    if type_name == "q8_0":
        return gguf.quants.quantize(array.astype(np.float32), Type.Q8_0).tobytes()
    return array.astype({"bf16": ml_dtypes.bfloat16, "f16": np.float16}[type_name]).tobytes()


@pytest.mark.parametrize("type_name", ["bf16", "f16", "q8_0"])
def test_tensor_bytes(gguf_file: GgufFile, type_name: str) -> None:
    exported = gguf_file("original", type_name)
    tensors = gguf_tensors(exported.path)
    assert {source_name(name) for name in tensors} == set(exported.source.files)
    for name, tensor in tensors.items():
        array = exported.source.read(source_name(name))
        assert list(tensor.shape) == list(array.shape[::-1]), name
        assert tensor.data.tobytes() == wanted_bytes(array, type_name), name


@pytest.mark.parametrize(("type_name", "exact"), [("bf16", True), ("f16", False), ("q8_0", False)])
def test_losses_are_named(gguf_file: GgufFile, type_name: str, exact: bool) -> None:
    exported = gguf_file("original", type_name)
    tensors, wanted = gguf_tensors(exported.path), {}
    for name, tensor in tensors.items():
        original = exported.source.read(source_name(name)).astype(np.float64)
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
        if (stored != original).any():
            wanted[source_name(name)] = np.abs(stored - original).max() / np.abs(original).max()
    found = {item["name"]: item["max_rel_error"] for item in exported.result["inexact_tensors"]}
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-3)
    assert exported.result["exact"] is exact


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("type_name", ["bf16", "f16"])
def test_losses_of_other_sources(tmp_path: Path, reference_folder: Path, dtype: type, type_name: str) -> None:
    config = tiny_config(vocab_size=8192)
    tensors = random_tensors(parse_config(config, "test"), dtype=dtype)
    folder = with_tokenizer(write_checkpoint(tmp_path / "tiny", config, tensors), reference_folder)
    result = export_gguf(open_checkpoint(folder), tmp_path / "out.gguf", type_name)
    exact = dtype == np.float16 and type_name == "f16"
    matrices = {name for name, array in tensors.items() if array.ndim == 2}
    assert {item["name"] for item in result["inexact_tensors"]} == (set() if exact else matrices)
    assert result["exact"] is exact
    for name, tensor in gguf_tensors(tmp_path / "out.gguf").items():
        assert tensor.data.tobytes() == wanted_bytes(tensors[source_name(name)], type_name), name


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_and_scale_is_the_solvers(gguf_file: GgufFile, name: str) -> None:
    exported = gguf_file(name)
    tensors = gguf_tensors(exported.path)
    for module in exported.linears:
        wanted, tensor = exported.source.linear(module), tensors[gguf_name(module)]
        assert isinstance(wanted, QuantizedTensor)
        assert tensor.tensor_type == QUANTIZED[name]
        blocks, repeat = read_blocks(tensor.data, tensor.tensor_type), wanted.scheme.group_size // 32
        np.testing.assert_array_equal(blocks.codes, wanted.codes, module)
        scales = np.repeat(wanted.scales.astype(np.float32), repeat, 1)
        np.testing.assert_array_equal(blocks.scales.astype(np.float32), scales, module)
        if wanted.zeros is not None:
            minimums = (-wanted.zeros.astype(np.float32) * wanted.scales.astype(np.float32)).astype(np.float16)
            np.testing.assert_array_equal(blocks.minimums, np.repeat(minimums, repeat, 1), module)


@pytest.mark.parametrize("name", ["gptq-w4a16-g128", "gptq-w4a16-g32", "rtn-w8a16"])
def test_gguf_py_dequantizes_to_the_same_weights(gguf_file: GgufFile, name: str) -> None:
    exported = gguf_file(name)
    assert (exported.result["exact"], exported.result["inexact_tensors"]) == (True, [])
    tensors = gguf_tensors(exported.path)
    for module in exported.linears:
        tensor = tensors[gguf_name(module)]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weight, dequantize(exported.source.linear(module)), module)


def test_q4_1_names_the_minimums_that_fp16_rounds(gguf_file: GgufFile) -> None:
    exported = gguf_file("gptq-w4a16-g32-asym")
    wanted = {}
    for module in exported.linears:
        linear = exported.source.linear(module)
        exact = -linear.zeros.astype(np.float64) * linear.scales.astype(np.float64)
        change = np.abs(exact.astype(np.float16).astype(np.float64) - exact).max()
        if change:
            wanted[f"{module}.minimums"] = change / np.abs(exact).max()
    found = {item["name"]: item["max_rel_error"] for item in exported.result["inexact_tensors"]}
    assert exported.result["exact"] is False
    assert found == pytest.approx(wanted, rel=1e-3)
    assert max(found.values()) < 2**-11


def test_fp32_scales_that_fp16_rounds_are_named(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "tiny", reference_folder)
    scheme = QuantScheme(4, group_size=32, scale_dtype="fp32")
    checkpoint = round_to_nearest(folder, tmp_path / "quantized", ("*", scheme))
    rounds = {
        f"{module}.scales"
        for module in checkpoint.config.all_linears()
        if (checkpoint.linear(module).scales.astype(np.float16) != checkpoint.linear(module).scales).any()
    }
    result = export_gguf(checkpoint, tmp_path / "out.gguf")
    assert {item["name"] for item in result["inexact_tensors"]} == rounds


def test_type_that_holds_the_codes_may_be_named(quantized: Callable, gguf_file: GgufFile, tmp_path: Path) -> None:
    result = export_gguf(open_checkpoint(quantized("gptq-w4a16-g128")), tmp_path / "model.gguf", "q4_0")
    assert result["files"][0]["sha256"] == gguf_file("gptq-w4a16-g128").result["files"][0]["sha256"]
