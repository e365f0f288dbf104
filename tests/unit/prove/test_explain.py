"""Where drift comes from: damage is found in the block, the linear, the expert and the channel where it was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.errors import InputError
from qwen3_export.prove.explain import check_explainable, explain
from qwen3_export.text.samples import Samples
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

IDS = tuple(np.random.default_rng(seed).integers(0, 320, 40).astype(np.int32) for seed in range(3))
SAMPLES = Samples(IDS, ("a", "b", "c"))


def _pair(folder: Path, config: dict[str, Any], damage: Callable[[dict[str, np.ndarray]], None]) -> dict[str, Any]:
    """A model beside a copy of it that was damaged, explained."""
    tensors = random_tensors(parse_config(config, "test"))
    original = open_checkpoint(write_checkpoint(folder / "original", config, tensors))
    changed = {name: array.copy() for name, array in tensors.items()}
    damage(changed)
    return explain(original, open_checkpoint(write_checkpoint(folder / "changed", config, changed)), SAMPLES)


def test_damage_is_found_where_it_was_done(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][7] = 0

    found = _pair(tmp_path, tiny_config(num_hidden_layers=3), damage)
    errors = [block["error"] for block in found["blocks"]]
    assert errors[0] == 0 < errors[1]
    assert errors[2] > 0
    assert [block["own_error"] > 0 for block in found["blocks"]] == [False, True, False]
    assert found["linears"][0]["name"] == "model.layers.1.mlp.down_proj"
    assert sum(one["error"] > 0 for one in found["linears"]) == 1
    assert {"block": 1, "channel": 7, "share": 1.0} in [{**c, "share": round(c["share"], 6)} for c in found["channels"]]
    assert found["experts"] == []


def test_errors_are_those_of_the_models_own_states(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith("q_proj.weight"):
                tensors[name] = (tensors[name].astype(np.float32) * 1.1).astype(tensors[name].dtype)

    config = tiny_config()
    found = _pair(tmp_path, config, damage)
    # After the last block, before the final norm: what transformers' forward of both folders gives.
    from transformers import AutoModelForCausalLM

    states = []
    for name in ("original", "changed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        kept: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(
            lambda _module, _inputs, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            for ids in IDS:
                model(torch.from_numpy(ids.astype(np.int64))[None])
        states.append(torch.cat([state.reshape(-1, state.shape[-1]) for state in kept]))
    wanted = float((states[1] - states[0]).norm() / states[0].norm())
    assert found["blocks"][-1]["error"] == pytest.approx(wanted, rel=1e-3)
    assert all(one["error"] == pytest.approx(0.1, rel=0.05) for one in found["linears"] if one["error"] > 0)


def test_damaged_expert_is_named(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][:] = 0

    found = _pair(tmp_path, tiny_moe_config(), damage)
    worst = found["experts"][0]
    assert (worst["layer"], worst["expert"]) == (1, 3)
    assert worst["tokens"] > 0
    assert all(one["error"] == 0 for one in found["experts"][1:])


def test_a_fold_is_said_and_single_linears_are_left_out(tmp_path: Path) -> None:
    def fold(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][:] *= 2
        for part in "qkv":
            tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:] /= 2

    found = _pair(tmp_path, tiny_config(), fold)
    assert found["folded"]
    assert found["linears"] == []
    assert max(block["error"] for block in found["blocks"]) < 1e-5


def test_only_folders_are_explained(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="no Hugging Face folder"):
        check_explainable(tmp_path / "model.gguf")
