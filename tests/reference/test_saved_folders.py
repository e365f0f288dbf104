"""Folders that transformers writes: every spelling, type and cut of them opens and gives its logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.shards import INDEX
from qwen3_export.core.source import open_source
from qwen3_export.solve.output_folder import readable_config
from tests.conftest import tiny_config, tiny_moe_config
from tests.reference.models import assert_same_logits, load_theirs

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "dense": tiny_config(rope_theta=1e6),
    "dense untied yarn": tiny_config(tie_word_embeddings=False, rope_scaling=YARN),
    "moe": tiny_moe_config(norm_topk_prob=False, rope_theta=5e5),
    "moe yarn": tiny_moe_config(rope_scaling=YARN, mlp_only_layers=[0]),
}
by_model = pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)


def save(values: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model of transformers, its weights large enough to tell one mistake from another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, changed: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(changed))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def in_4x(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it: `rope_theta`, `rope_scaling`, `num_experts` and `torch_dtype`."""
    config = copy.deepcopy(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


@by_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_folder_gives_its_logits(tmp_path: Path, values: dict[str, Any], dtype: torch.dtype) -> None:
    folder = save(values, tmp_path / "saved", dtype)
    stored = {open_checkpoint(folder).entry(name).dtype.name for name in open_checkpoint(folder).files}
    assert stored == {str(dtype).removeprefix("torch.")}
    assert_same_logits(folder, folder)


@by_model
def test_a_sharded_folder_gives_its_logits(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = save(values, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 4
    assert (folder / INDEX).exists()
    assert_same_logits(folder, folder)


@by_model
def test_the_4x_spelling_of_a_folder_gives_the_same_logits(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = save(values, tmp_path / "old", torch.bfloat16)
    config = open_source(str(folder)).config
    edit_config(folder, in_4x(read_config(folder)))
    assert "rope_parameters" not in read_config(folder)
    assert open_source(str(folder)).config == config
    assert_same_logits(folder, folder)


def test_a_tied_folder_holds_no_head(tmp_path: Path) -> None:
    folder = save(tiny_config(), tmp_path / "tied")
    assert "lm_head.weight" not in open_checkpoint(folder).files


@by_model
@pytest.mark.parametrize("spelling", ["5.x", "4.x"])
def test_the_configuration_that_we_write_is_read_alike_by_both(
    tmp_path: Path, values: dict[str, Any], spelling: str
) -> None:
    folder = save(values, tmp_path / "saved")
    before, original = AutoConfig.from_pretrained(folder), read_config(folder)
    written = readable_config(original if spelling == "5.x" else in_4x(original))
    edit_config(folder, written)
    after = AutoConfig.from_pretrained(folder)
    for key in ("rope_parameters", "head_dim", "num_hidden_layers", "tie_word_embeddings", "dtype", "vocab_size"):
        assert getattr(after, key) == getattr(before, key)
    assert getattr(after, "num_experts", None) == getattr(before, "num_experts", None)
    # What transformers 4 looks for.
    theirs = in_4x(original)
    for key in ("rope_theta", "rope_scaling", "torch_dtype", "num_experts"):
        assert written.get(key) == theirs.get(key)
    # Sglang, vLLM and transformers 5 find theirs.
    assert written["rope_parameters"]["rope_theta"] == values["rope_theta"]
    assert written["dtype"] == "float32"
    assert_same_logits(folder, folder)


def test_what_we_write_twice_is_what_we_write_once(tmp_path: Path) -> None:
    for name, values in MODELS.items():
        once = readable_config(read_config(save(values, tmp_path / name)))
        assert readable_config(once) == once


def test_the_weights_survive_our_reading_bit_for_bit(tmp_path: Path) -> None:
    folder = save(MODELS["dense untied yarn"], tmp_path / "saved", torch.bfloat16)
    checkpoint, state = open_checkpoint(folder), load_theirs(folder).state_dict()
    assert set(checkpoint.files) == set(state)
    for name, wanted in state.items():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), wanted.numpy())
