"""Checkpoint folders: shards, the audit of every tensor, tied heads, and folders that promise too much."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import MANIFEST
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.shards import INDEX, SINGLE
from qwen3_export.core.source import open_source
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.errors import InputError
from tests.conftest import random_tensors, tiny_config, tiny_moe_config
from tests.unit.core.checkpoints import Tensors, assert_holds, refuses


@pytest.fixture
def sharded(tmp_path: Path, tensors: Tensors) -> Callable[..., Path]:
    """`sharded(edit=…)` writes three shards; `edit` may change the index's `weight_map`."""

    def write(edit: Callable[[dict[str, Any]], object] = lambda weight_map: None) -> Path:
        weight_map: dict[str, Any] = {}
        for number in range(3):
            names = list(tensors)[number::3]
            path = tmp_path / f"model-0000{number + 1}-of-00003.safetensors"
            write_tensors(path, [(name, tensors[name]) for name in names])
            weight_map.update(dict.fromkeys(names, path.name))
        edit(weight_map)
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
        return tmp_path

    return write


def test_a_single_file_is_read_bit_for_bit(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tensors=tensors))
    assert set(checkpoint.files) == set(tensors)
    assert_holds(checkpoint, tensors)
    assert checkpoint.bits_per_weight == 16
    assert not checkpoint.is_quantized


def test_shards_are_read_as_the_index_says(sharded: Callable[..., Path], tensors: Tensors) -> None:
    checkpoint = open_checkpoint(sharded())
    assert set(checkpoint.files) == set(tensors)
    assert len({file.path for file in checkpoint.files.values()}) == 3
    assert_holds(checkpoint, tensors)


def test_a_single_file_beside_an_index_wins_as_in_transformers(sharded: Callable[..., Path], tensors: Tensors) -> None:
    folder, other = sharded(), random_tensors(parse_config(tiny_config(), "test"), seed=1)
    write_tensors(folder / SINGLE, other.items())
    assert_holds(open_checkpoint(folder), other)


def test_a_missing_shard_is_named(sharded: Callable[..., Path]) -> None:
    folder = sharded()
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refuses(folder, r"model-00002-of-00003\.safetensors: shard is missing") == "download the checkpoint again"


def test_a_truncated_shard_is_named(sharded: Callable[..., Path]) -> None:
    folder = sharded()
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(folder, r"model-00002-of-00003\.safetensors: tensor .* ends at byte")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", None, 3, ["a"], "a\x00b/c"]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded: Callable[..., Path], name: Any) -> None:
    folder = sharded(lambda weight_map: weight_map.update({"model.norm.weight": name}))
    refuses(folder, r"tensor model\.norm\.weight points outside of the folder")


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(sharded: Callable[..., Path]) -> None:
    folder = sharded(lambda weight_map: weight_map.update({"extra.weight": "model-00001-of-00003.safetensors"}))
    refuses(folder, r"00001-of-00003\.safetensors: tensor extra\.weight is missing, though the index promises it")


def test_a_tensor_that_the_index_forgets_is_missing(sharded: Callable[..., Path]) -> None:
    folder = sharded(lambda weight_map: weight_map.pop("model.norm.weight"))
    refuses(folder, r"tensor model\.norm\.weight \[64\] is missing")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_refused(sharded: Callable[..., Path], text: str) -> None:
    folder = sharded()
    (folder / INDEX).write_text(text, encoding="latin-1")
    refuses(folder, "index")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(make_checkpoint: Callable[..., Path], text: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(text, encoding="latin-1")
    refuses(folder, r"config\.json")


def test_a_folder_without_configuration_or_tensors_is_refused(tmp_path: Path) -> None:
    assert refuses(tmp_path, r"config\.json: cannot be read") == "not a checkpoint folder?"
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert refuses(tmp_path, "neither model.safetensors nor") == "only safetensors checkpoints are read"


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_every_missing_tensor_is_named(make_checkpoint: Callable[..., Path], tensors: Tensors, name: str) -> None:
    rest = {key: value for key, value in tensors.items() if key != name}
    refuses(make_checkpoint(tensors=rest), f"tensor {name} .* is missing")


def test_a_wrong_shape_says_both_shapes(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = {**tensors, name: tensors[name].reshape(64, 128)}
    refuses(make_checkpoint(tensors=changed), rf"{name} has shape \[64, 128\], config\.json asks for \[128, 64\]")


@pytest.mark.parametrize("changes", [{"head_dim": 16}, {"num_key_value_heads": 4}, {"vocab_size": 321}])
def test_a_configuration_that_does_not_fit_its_tensors_is_refused(
    make_checkpoint: Callable[..., Path], tensors: Tensors, changes: dict[str, Any]
) -> None:
    refuses(make_checkpoint(tiny_config(**changes), tensors), r"has shape .*, config\.json asks for")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "vision.patch.weight"]
)
def test_a_tensor_that_belongs_nowhere_is_named(
    make_checkpoint: Callable[..., Path], tensors: Tensors, name: str
) -> None:
    changed = {**tensors, name: np.zeros(3, np.float32)}
    refuses(make_checkpoint(tensors=changed), f"tensor {name} belongs to no part of a Qwen3 model")


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(
    make_checkpoint: Callable[..., Path], tensors: Tensors
) -> None:
    changed = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16, np.float32)}
    assert open_checkpoint(make_checkpoint(tensors=changed)).config == parse_config(tiny_config(), "")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64, ml_dtypes.float8_e4m3fn])
def test_a_weight_of_another_type_is_refused(
    make_checkpoint: Callable[..., Path], tensors: Tensors, dtype: Any
) -> None:
    changed = {**tensors, "model.norm.weight": np.ones(64, dtype)}
    refuses(make_checkpoint(tensors=changed), f"model.norm.weight is stored as {np.dtype(dtype).name}; float32 or")


def test_types_may_differ_from_tensor_to_tensor(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    names = list(tensors)
    changed = {
        name: tensors[name].astype((np.float32, np.float16, ml_dtypes.bfloat16)[i % 3]) for i, name in enumerate(names)
    }
    assert_holds(open_checkpoint(make_checkpoint(tensors=changed)), changed)


def with_head(tensors: Tensors, head: np.ndarray) -> Tensors:
    return {**tensors, "lm_head.weight": head}


def test_a_tied_head_stored_twice_is_the_embedding(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    checkpoint = open_checkpoint(make_checkpoint(tensors=with_head(tensors, embedding)))
    assert checkpoint.head == "model.embed_tokens.weight"
    assert checkpoint.bits_per_weight == 16


@pytest.mark.parametrize("row", [0, 200, 319])
def test_a_tied_head_that_differs_anywhere_is_refused(
    make_checkpoint: Callable[..., Path], tensors: Tensors, row: int
) -> None:
    head = tensors["model.embed_tokens.weight"].copy()
    head[row, 63] += 1
    hint = refuses(make_checkpoint(tensors=with_head(tensors, head)), "ties lm_head to the embedding, but")
    assert hint is not None
    assert "tie_word_embeddings" in hint


def test_a_tied_head_of_another_shape_is_refused(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    refuses(make_checkpoint(tensors=with_head(tensors, embedding[:-1])), "lm_head.weight is tied but its shape")


def test_an_untied_head_is_its_own_tensor(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_config(tie_word_embeddings=False)
    checkpoint = open_checkpoint(make_checkpoint(config))
    assert checkpoint.head == "lm_head.weight"
    assert checkpoint.config.num_parameters == open_checkpoint(make_checkpoint()).config.num_parameters + 320 * 64
    rest = random_tensors(parse_config(config, ""))
    del rest["lm_head.weight"]
    refuses(make_checkpoint(config, rest, "other"), r"tensor lm_head\.weight \[320, 64\] is missing")


def test_a_mixture_of_experts_opens_and_a_missing_expert_is_named(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_moe_config(decoder_sparse_step=2)
    tensors = random_tensors(parse_config(config, ""))
    assert_holds(open_checkpoint(make_checkpoint(config, tensors)), tensors)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    refuses(
        make_checkpoint(config, tensors, "other"), r"layers\.1\.mlp\.experts\.7\.up_proj\.weight \[48, 64\] is missing"
    )


def test_the_hash_is_of_names_and_bytes(make_checkpoint: Callable[..., Path], tensors: Tensors) -> None:
    folder = make_checkpoint(tensors=tensors)
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in ("config.json", SINGLE)]
    assert open_checkpoint(folder).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    copy = shutil.copytree(folder, folder.with_name("copy"))
    assert open_checkpoint(copy).sha256 == open_checkpoint(folder).sha256
    (copy / "config.json").write_text(json.dumps(tiny_config(rope_theta=9999.0)))
    assert open_checkpoint(copy).sha256 != open_checkpoint(folder).sha256


def test_sidecars_are_what_travels_with_the_model(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    wanted = [
        "LICENSE",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "spiece.model",
    ]
    for name in [*wanted, MANIFEST, INDEX, "optimizer.bin", "README.md"]:
        (folder / name).write_text("{}")
    (folder / "folder.json").mkdir()
    (folder / INDEX).unlink()
    assert [path.name for path in open_checkpoint(folder).sidecars()] == wanted


@pytest.mark.parametrize(
    ("spec", "message"), [("no/such/folder/here", "no such folder"), ("~/nowhere-at-all", "no such folder")]
)
def test_a_source_that_is_nothing_is_an_input_error(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(spec)


def test_a_source_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(InputError, match="is a file, a checkpoint folder was expected"):
        open_source(str(path))
