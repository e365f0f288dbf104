"""Metadata of GGUF files, as llama.cpp's convert_hf_to_gguf.py writes it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import CheckpointError
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import GgufFile, gguf_fields, tiny_with_tokenizer, with_tokenizer
from tests.conftest import tiny_config, write_checkpoint

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
    found, config = gguf_fields(exported.path), json.loads((reference_folder / "tokenizer_config.json").read_text())
    assert found.pop("tokenizer.chat_template") == config["chat_template"]
    assert list(found) == list(METADATA)
    assert found == METADATA


@pytest.mark.parametrize(("name", "file_type"), [("gptq-w4a16-g128", 2), ("gptq-w4a16-g32-asym", 3), ("rtn-w8a16", 7)])
def test_metadata_of_a_quantized_file(gguf_file: GgufFile, name: str, file_type: int) -> None:
    """The converter's keys with the file type of the codes, and our own about where they come from."""
    exported = gguf_file(name)
    found, manifest = gguf_fields(exported.path), json.loads((exported.source.folder / "qwen3-export.json").read_text())
    assert found["general.file_type"] == file_type
    assert found["qwen3_export.recipe"] == name
    assert found["qwen3_export.source.sha256"] == manifest["source"]["sha256"]
    ours = {key for key in found if key.startswith("qwen3_export.")}
    theirs = set(found) - ours - {"tokenizer.chat_template"}
    # The folder's name, here the recipe's, is where the converter takes these from.
    named_after_the_folder = {"general.basename", "general.finetune", "general.version"}
    # And these from its model card.
    assert theirs - named_after_the_folder - {"general.tags"} == set(METADATA)
    tensor_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(exported.path).tensors)
    assert exported.result["bits_per_weight"] == 8 * tensor_bytes / exported.source.config.num_parameters


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
    found = gguf_fields(tmp_path / "out.gguf")
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
    found = {k.removeprefix(prefix): v for k, v in gguf_fields(tmp_path / "out.gguf").items() if k.startswith(prefix)}
    assert found == wanted
