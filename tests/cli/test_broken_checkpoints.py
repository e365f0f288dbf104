"""Broken and foreign checkpoints: exit 2, one line that names the file or the tensor, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import call, names, refused

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of the weights; the bytes of the tensors stay as they are."""
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def _truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def _claim_huge_header(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + raw[8:])


def _overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[Q_PROJ]["data_offsets"] = [place - 64 for place in header[Q_PROJ]["data_offsets"]]

    _change_header(folder, change)


def _point_outside(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[Q_PROJ]["data_offsets"]
        header[Q_PROJ]["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]

    _change_header(folder, change)


def _shard(folder: Path, file: str) -> None:
    """An index that places every tensor in `file`, in place of the single file."""
    raw = (folder / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    places = {name: file for name in header if name != "__metadata__"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / WEIGHTS).unlink()


def _escape(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder.parent / "outside.safetensors")
    _shard(folder, "../outside.safetensors")


def _break_index(folder: Path) -> None:
    _shard(folder, WEIGHTS)
    (folder / INDEX).write_text("{")


def _drop_tensor(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.layers.0.self_attn.q_proj.wait"] = header.pop(Q_PROJ)

    _change_header(folder, change)


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _change_config(folder, **changes)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


# What is done to a good folder, and what the error must name.
BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated": (_truncate, (WEIGHTS, "truncated")),
    "empty weights": (_write(WEIGHTS, b""), (WEIGHTS, "too short")),
    "header of 2^60 bytes": (_claim_huge_header, (WEIGHTS, str(1 << 60))),
    "header no JSON": (_write(WEIGHTS, (4).to_bytes(8, "little") + b"{{{{"), (WEIGHTS, "JSON")),
    "overlapping tensors": (_overlap, (WEIGHTS, "overlap")),
    "tensor beyond the file": (_point_outside, (WEIGHTS, Q_PROJ)),
    "tensor of another name": (_drop_tensor, (Q_PROJ, "missing")),
    "missing shard": (lambda folder: _shard(folder, "model-00001-of-00002.safetensors"), ("00001-of-00002", "missing")),
    "shard outside": (_escape, ("outside.safetensors", "outside of the folder")),
    "index no JSON": (_break_index, (INDEX, "JSON")),
    "no weights": (_remove(WEIGHTS), (WEIGHTS,)),
    "no config": (_remove("config.json"), ("config.json",)),
    "config no JSON": (_write("config.json", b"{"), ("config.json", "JSON")),
    "config no UTF-8": (_write("config.json", b"\xff\xff"), ("config.json", "JSON")),
    "config a list": (_write("config.json", b"[]"), ("config.json", "list")),
    "llama": (_config(model_type="llama"), ("llama", "qwen3")),
    "no layers": (_config(num_hidden_layers=0), ("num_hidden_layers", "0")),
    "another hidden size": (_config(hidden_size=256), ("model.embed_tokens.weight", "256")),
    "more layers": (_config(num_hidden_layers=3), ("model.layers.2", "missing")),
    "fewer layers": (_config(num_hidden_layers=1), ("model.layers.1",)),
    "another head_dim": (_config(head_dim=64), ("model.layers.0.self_attn.q_norm.weight", "64")),
    "an untied head": (_config(tie_word_embeddings=False), ("lm_head.weight", "missing")),
    "quantized by another tool": (_config(quantization_config={"quant_method": "nobody"}), ("nobody",)),
}


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "in" / "model"))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_by_every_command(case: str, copy: Path, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    change(copy)
    out = tmp_path / "out"
    out.mkdir()
    for arguments in (
        ("inspect", copy),
        ("quantize", copy, "--recipe", "rtn-w4a16-g32", "--output", out / "quantized"),
        ("onnx", copy, "--output", out / "onnx"),
        ("gguf", copy, "--output", out / "model.gguf"),
        ("tensorrt", copy, "--output", out / "trt"),
        ("reference", copy, "--output", out / "reference"),
        ("run", copy, "--prompt", "hello"),
    ):
        refused(call(*arguments), 2, *words)
    assert names(out) == []


# Files that come along with the weights are read by some commands only.
SIDECARS: dict[str, tuple[str, bytes, str]] = {
    "tokenizer no JSON": ("tokenizer.json", b"{}", "tokenizer.json"),
    "tokenizer_config no JSON": ("tokenizer_config.json", b"{", "tokenizer_config.json"),
    "tokenizer_config a list": ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    "template no text": ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
    "template no UTF-8": ("chat_template.jinja", b"\xff\xff", "chat_template.jinja"),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_broken_sidecar_is_named(case: str, copy: Path, tmp_path: Path) -> None:
    name, content, word = SIDECARS[case]
    (copy / name).write_bytes(content)
    short = ("--samples", "2", "--sequence-length", "64")
    refused(call("run", copy, "--prompt", "hello", "--max-new-tokens", "1"), 2, word)
    refused(call("gguf", copy, "--output", tmp_path / "model.gguf"), 2, word)
    refused(call("quantize", copy, "--recipe", "gptq-w4a16-g32", "--output", tmp_path / "out", *short), 2, word)
    assert names(tmp_path) == ["in"]


@pytest.mark.parametrize("content", [b"{", b"[1]"], ids=["no JSON", "a list"])
def test_broken_generation_config_is_named(content: bytes, copy: Path, tmp_path: Path) -> None:
    (copy / "generation_config.json").write_bytes(content)
    for arguments in (("run", copy, "--prompt", "hello"), ("onnx", copy, "--output", tmp_path / "out")):
        refused(call(*arguments), 2, "generation_config.json")
    assert names(tmp_path) == ["in"]


def test_tokenizer_with_more_tokens_than_the_model(copy: Path, tmp_path: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 8192, "content": "<|new|>"})
    path.write_text(json.dumps(tokenizer))
    refused(call("gguf", copy, "--output", tmp_path / "model.gguf"), 2, "8192")
    refused(call("run", copy, "--prompt", "<|new|>"), 2, "8192")
    text = tmp_path / "in" / "text.txt"
    text.write_text("<|new|> one two three " * 50)
    short = ("--samples", "2", "--sequence-length", "64", "--calibration", text)
    refused(call("quantize", copy, "--recipe", "gptq-w4a16-g32", "--output", tmp_path / "out", *short), 2, "vocabulary")
    refused(call("reference", copy, "--output", tmp_path / "out", "--text", text), 2, "vocabulary")
    assert names(tmp_path) == ["in"]


def test_quantized_source_is_not_quantized_again(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("quantize", made["quantized"], "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "again")
    refused(outcome, 2, "quantized already")
    refused(call("onnx", made["quantized"], "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "again"), 2, "already")
    assert names(tmp_path) == []
