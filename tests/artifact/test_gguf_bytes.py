"""What is in a GGUF file, read with gguf-py: 16-bit and q8_0 files are, byte for byte, those of llama.cpp's
convert_hf_to_gguf.py; codes and scales of quantized ones equal the solver's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from qwen3_export.errors import CheckpointError, InputError, UnsupportedError
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import (
    Exported,
    gguf_name,
    gguf_tensors,
    read_blocks,
    round_to_nearest,
    tiny_with_tokenizer,
    with_tokenizer,
)
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

QUANTIZED = {
    "gptq-w4a16-g128": Type.Q4_0,
    "gptq-w4a16-g32": Type.Q4_0,
    "gptq-w4a16-g32-asym": Type.Q4_1,
    "rtn-w8a16": Type.Q8_0,
}
GgufFile = Callable[..., Exported]

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


def fields(path: Path) -> dict[str, Any]:
    """`{key: value}` in the file's order, GGUF's own header left out; long arrays by length."""
    values = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    return {
        name: len(value) if isinstance(value, list) else value
        for name, value in values.items()
        if not name.startswith("GGUF.")
    }


# As the converter's own files have them, in order.
METADATA = {
    "general.architecture": "qwen3",
    "general.type": "model",
    "general.sampling.top_k": 20,
    "general.sampling.top_p": pytest.approx(0.95),
    "general.sampling.temp": pytest.approx(0.6),
    "general.name": "Reference Model",
    "general.size_label": "8.0M",
    "qwen3.block_count": 6,
    "qwen3.context_length": 2048,
    "qwen3.embedding_length": 256,
    "qwen3.feed_forward_length": 768,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.rope.freq_base": 1e6,
    "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    "qwen3.attention.key_length": 128,
    "qwen3.attention.value_length": 128,
    "general.file_type": 32,
    "general.quantization_version": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": 8192,
    "tokenizer.ggml.token_type": 8192,
    "tokenizer.ggml.merges": 7929,
    "tokenizer.ggml.eos_token_id": 8187,
    "tokenizer.ggml.padding_token_id": 8185,
    "tokenizer.ggml.add_bos_token": False,
}


def test_metadata_of_a_16_bit_file(gguf_file: GgufFile, reference_folder: Path) -> None:
    exported = gguf_file("original", "bf16")
    found, config = fields(exported.path), json.loads((reference_folder / "tokenizer_config.json").read_text())
    assert found.pop("tokenizer.chat_template") == config["chat_template"]
    assert list(found) == list(METADATA)
    assert found == METADATA


@pytest.mark.parametrize(("name", "file_type"), [("gptq-w4a16-g128", 2), ("gptq-w4a16-g32-asym", 3), ("rtn-w8a16", 7)])
def test_metadata_of_a_quantized_file(gguf_file: GgufFile, name: str, file_type: int) -> None:
    """The converter's keys with the file type of the codes, and our own about where they come from."""
    exported = gguf_file(name)
    found, manifest = fields(exported.path), json.loads((exported.source.folder / "qwen3-export.json").read_text())
    assert found["general.file_type"] == file_type
    assert found["qwen3_export.recipe"] == name
    assert found["qwen3_export.source.sha256"] == manifest["source"]["sha256"]
    ours = {key for key in found if key.startswith("qwen3_export.")}
    theirs = set(found) - ours - {"tokenizer.chat_template"}
    # The folder's name, here the recipe's, is where the converter takes these from.
    named_after_the_folder = {"general.basename", "general.finetune", "general.version"}
    # And these from its model card.
    assert theirs - named_after_the_folder - {"general.tags"} == set(METADATA)
    assert exported.path.stat().st_size * 8 / exported.source.config.num_parameters == pytest.approx(
        exported.result["bits_per_weight"]
    )


def test_token_types(gguf_file: GgufFile) -> None:
    """1 normal, 3 control, 4 user-defined: tokenizer_config.json overrules tokenizer.json."""
    found = gguf.GGUFReader(gguf_file("original", "bf16").path).fields
    tokens, types = (found[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    special = dict(zip(tokens[8185:], types[8185:], strict=True))
    assert special == {
        "<|endoftext|>": 3,
        "<|im_start|>": 3,
        "<|im_end|>": 3,
        "<think>": 4,
        "</think>": 4,
        "<tool_call>": 4,
        "</tool_call>": 4,
    }
    assert set(types[:8185]) == {1}


def published_folder(folder: Path, reference_folder: Path) -> Path:
    """Settings as the published Qwen3 folders have them: padded vocabulary, bos only in config.json, ByteLevel."""
    config = tiny_config(vocab_size=8256, bos_token_id=8185, eos_token_id=8187)
    with_tokenizer(write_checkpoint(folder, config), reference_folder)
    path = folder / "tokenizer.json"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": byte_level}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- edge\n---\n# A model\n")
    return folder


def test_metadata_of_a_published_folder(tmp_path: Path, reference_folder: Path) -> None:
    """Values recorded from the converter, run on such folders."""
    folder = published_folder(tmp_path / "Qwen3-4B-Instruct-2507", reference_folder)
    export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    found = fields(tmp_path / "out.gguf")
    assert found["general.name"] == "Qwen3 4B Instruct 2507"
    assert found["general.version"] == "2507"
    assert found["general.finetune"] == "4b-Instruct"
    assert found["general.basename"] == "Qwen3"
    assert found["general.size_label"] == "615K"
    assert found["general.license"] == "apache-2.0"
    assert found["general.tags"] == 1
    special = [key for key in found if key.startswith("tokenizer.ggml.") and not isinstance(found[key], str)]
    assert special[3:] == [
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
    ]
    assert [found[key] for key in special[3:]] == [8187, 8185, 8185, False, False]


def test_padding_of_the_vocabulary(tmp_path: Path, reference_folder: Path) -> None:
    """Qwen's tables are longer than the tokenizer: the converter calls such ids `[PAD…]`, unused (5)."""
    folder = published_folder(tmp_path / "padded", reference_folder)
    export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    found = gguf.GGUFReader(tmp_path / "out.gguf").fields
    tokens, types = (found[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[8192:] == [f"[PAD{i}]" for i in range(8192, 8256)]
    assert set(types[8192:]) == {5}


def test_broken_front_matter_is_named(tmp_path: Path, reference_folder: Path) -> None:
    folder = published_folder(tmp_path / "tiny", reference_folder)
    (folder / "README.md").write_text("---\nlicense: [apache\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        export_gguf(open_checkpoint(folder), tmp_path / "out" / "model.gguf")
    assert not list((tmp_path / "out").glob("*"))


def test_experts_are_stacked(tmp_path: Path, reference_folder: Path) -> None:
    config = tiny_moe_config(moe_intermediate_size=64)
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, config)
    scheme = QuantScheme(4, group_size=32)
    for checkpoint, kind in (
        (open_checkpoint(folder), Type.BF16),
        (round_to_nearest(folder, tmp_path / "quantized", ("*", scheme)), Type.Q4_0),
    ):
        output = tmp_path / f"{kind.name}.gguf"
        assert export_gguf(checkpoint, output)["exact"]
        check_experts(gguf_tensors(output), checkpoint, kind)


def check_experts(tensors: dict[str, Any], checkpoint: Any, kind: Type) -> None:
    for layer in range(checkpoint.config.num_layers):
        for part in ("gate", "up", "down"):
            tensor = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert tensor.tensor_type == kind
            weights = gguf.quants.dequantize(tensor.data, kind)
            for expert, weight in enumerate(weights):
                wanted = checkpoint.linear(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj")
                array = dequantize(wanted) if isinstance(wanted, QuantizedTensor) else wanted.astype(np.float32)
                np.testing.assert_array_equal(weight, array)
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert router.tensor_type == Type.F32
        np.testing.assert_array_equal(router.data, checkpoint.read(f"model.layers.{layer}.mlp.gate.weight"))


# One block of the converter's file of such a model; experts come when the last of them was read.
EXPERT_BLOCK = [
    "attn_norm",
    "ffn_down_exps",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_gate_inp",
    "ffn_norm",
    "attn_k_norm",
    "attn_k",
    "attn_output",
    "attn_q_norm",
    "attn_q",
    "attn_v",
]


def test_order_of_expert_tensors(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    export_gguf(open_checkpoint(folder), tmp_path / "moe.gguf")
    blocks = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in EXPERT_BLOCK]
    wanted = ["output.weight", "token_embd.weight", *blocks, "output_norm.weight"]
    assert list(gguf_tensors(tmp_path / "moe.gguf")) == wanted


def test_expert_metadata(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    export_gguf(open_checkpoint(folder), tmp_path / "moe.gguf")
    found = fields(tmp_path / "moe.gguf")
    assert found["general.architecture"] == "qwen3moe"
    wanted = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 48, "feed_forward_length": 96}
    assert {key: found[f"qwen3moe.{key}"] for key in wanted} == wanted


YARN_KEYS = [
    ({}, {"type": "yarn", "factor": 4.0, "original_context_length": 32}),
    # llama.cpp multiplies by 1 + 0.1 ln(factor) itself.
    (
        {"attention_factor": 1.25},
        {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 32,
            "attn_factor": pytest.approx(1.25 / (1 + 0.1 * np.log(4))),
        },
    ),
]


@pytest.mark.parametrize(("changes", "wanted"), YARN_KEYS, ids=["default", "attention_factor"])
def test_yarn_metadata(tmp_path: Path, reference_folder: Path, changes: dict, wanted: dict) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **changes}
    folder = tiny_with_tokenizer(tmp_path / "tiny", reference_folder, tiny_config(rope_scaling=scaling))
    export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    prefix = "qwen3.rope.scaling."
    found = {k.removeprefix(prefix): v for k, v in fields(tmp_path / "out.gguf").items() if k.startswith(prefix)}
    assert found == wanted


# Groups of 48 need widths of 96 throughout.
WIDTH_96 = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
UNFIT = [
    (QuantScheme(4, strategy="channel"), "multiple of 32"),
    (QuantScheme(8, strategy="channel"), "multiple of 32"),
    (QuantScheme(4, group_size=48), "multiple of 32"),
    (QuantScheme(4, group_size=16), "multiple of 32"),
    (QuantScheme(2, group_size=32), "2-bit"),
    (QuantScheme(8, group_size=32, symmetric=False), "8-bit asymmetric"),
]


@pytest.mark.parametrize(("scheme", "reason"), UNFIT, ids=lambda value: getattr(value, "label", None))
def test_schemes_that_do_not_fit(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme, reason: str) -> None:
    checkpoint = round_to_nearest(make_checkpoint(tiny_config(**WIDTH_96)), tmp_path / "quantized", ("*", scheme))
    with pytest.raises(UnsupportedError, match=reason) as caught:
        export_gguf(checkpoint, tmp_path / "out" / "model.gguf")
    assert "self_attn.q_proj" in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type_name", ["bf16", "q8_0", "q4_1"])
def test_codes_are_never_requantized(quantized: Callable, tmp_path: Path, type_name: str) -> None:
    checkpoint = open_checkpoint(quantized("gptq-w4a16-g128"))
    with pytest.raises(UnsupportedError, match="q4_0") as caught:
        export_gguf(checkpoint, tmp_path / "out" / "model.gguf", type_name)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_type_that_holds_the_codes_may_be_named(quantized: Callable, gguf_file: GgufFile, tmp_path: Path) -> None:
    result = export_gguf(open_checkpoint(quantized("gptq-w4a16-g128")), tmp_path / "model.gguf", "q4_0")
    assert result["files"][0]["sha256"] == gguf_file("gptq-w4a16-g128").result["files"][0]["sha256"]


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
