"""Our forward pass against transformers' on random models of every shape that Qwen3 knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.model.decoder import Decoder
from tests.conftest import random_tensors, tiny_config, tiny_moe_config
from tests.reference.models import (
    TOLERANCE,
    assert_same_logits,
    load_theirs,
    our_logits,
    random_rows,
    relative_error,
    their_logits,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "plain": {},
    "theta 1e6": {"rope_theta": 1e6},
    "yarn": {"rope_scaling": YARN},
    "yarn with attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.8}},
    "yarn without original length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn old spelling": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn betas": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.5}},
    "yarn without truncation": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.5}},
    "yarn one mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "yarn below one": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn as the model cards write it": {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 256,
    },
}
DENSE = {
    "four heads, two shared": {},
    "every head its own": {"num_key_value_heads": 4},
    "eight heads, one shared": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "six heads, three shared": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    "head_dim is hidden / heads": {"head_dim": 16},
    "wide heads": {"head_dim": 64},
    "odd sizes": {"hidden_size": 40, "intermediate_size": 88, "vocab_size": 301, "head_dim": 10},
    "untied": {"tie_word_embeddings": False},
    "one layer": {"num_hidden_layers": 1},
    "large epsilon": {"rms_norm_eps": 0.1},
}
MOE = {
    "normalised": {},
    "not normalised": {"norm_topk_prob": False},
    "one expert per token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8, "norm_topk_prob": False},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 3},
    "some layers dense": {"mlp_only_layers": [0, 2], "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_scaling": YARN},
    "eight heads, one shared": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
}


def check(folder: Path, config: dict[str, Any], make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(config, random_tensors(parse_config(config, "test"), dtype=np.float32), folder.name)
    assert_same_logits(folder, folder)


@pytest.mark.parametrize("changes", DENSE.values(), ids=DENSE)
def test_dense_logits_are_transformers(
    tmp_path: Path, make_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    check(tmp_path / "dense", tiny_config(**changes), make_checkpoint)


@pytest.mark.parametrize("changes", MOE.values(), ids=MOE)
def test_mixture_logits_are_transformers(
    tmp_path: Path, make_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    check(tmp_path / "moe", tiny_moe_config(**changes), make_checkpoint)


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_logits_with_scaled_positions_are_transformers(
    tmp_path: Path, make_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    check(tmp_path / "rope", tiny_config(**changes), make_checkpoint)


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_rotary_tables_are_transformers_up_to_the_last_position(changes: dict[str, Any]) -> None:
    values = tiny_config(head_dim=128, **changes)
    theirs, ours = Qwen3RotaryEmbedding(AutoConfig.for_model(**values)), parse_config(values, "test").rope
    np.testing.assert_allclose(ours.inverse_frequencies(128), theirs.inv_freq, rtol=5e-7)
    positions = 4096
    cos, sin = theirs(torch.zeros(1), torch.arange(positions)[None])
    # One unit in the last place of a frequency turns position 4096 by 4096 * 6e-8 radians.
    for found, wanted in zip(ours.cos_sin(128, positions), (cos[0, :, :64], sin[0, :, :64]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        np.testing.assert_allclose(found[:64], wanted[:64], atol=2e-5)


@pytest.mark.parametrize("config", [tiny_config(rope_scaling=YARN), tiny_moe_config()], ids=["dense", "moe"])
@pytest.mark.parametrize("pieces", [[20, *[1] * 20], [1] * 12, [7, 9, 1, 15, 1]], ids=["decode", "singly", "chunks"])
def test_pieces_with_a_cache_give_the_logits_of_the_whole(
    make_checkpoint: Callable[..., Path], config: dict[str, Any], pieces: list[int]
) -> None:
    folder = make_checkpoint(config, random_tensors(parse_config(config, "test"), dtype=np.float32))
    (ids,) = random_rows(320, [sum(pieces)])
    whole = their_logits(load_theirs(folder), ids)
    decoder, begin = Decoder(open_checkpoint(folder)), 0
    caches = decoder.new_caches()
    for length in pieces:
        found = decoder.logits(decoder.hidden([ids[begin : begin + length]], [caches])[0]).numpy()
        assert relative_error(found, whole[begin : begin + length]) <= TOLERANCE
        begin += length


def test_greedy_text_is_transformers(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    prompts, model = random_rows(320, [3, 9, 20]), load_theirs(folder)
    found = Decoder(open_checkpoint(folder)).greedy(prompts, 12)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :]
        np.testing.assert_array_equal(text, wanted)


def test_sequences_in_step_give_transformers_logits(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tiny_moe_config())
    model, decoder, rows = load_theirs(folder), Decoder(open_checkpoint(folder)), np.stack(random_rows(320, [9] * 3))
    caches = decoder.new_caches()
    for columns in (slice(0, 5), slice(5, 6), slice(6, 9)):
        found = decoder.step(rows[:, columns], caches).numpy()
        for row, logits in zip(rows, found, strict=True):
            assert relative_error(logits, their_logits(model, row[: columns.stop])[-1]) <= TOLERANCE


def test_blocks_read_anew_give_the_logits_of_resident_ones(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = make_checkpoint(tiny_moe_config()), random_rows(320)
    resident = our_logits(folder, rows)
    monkeypatch.setattr(Decoder, "RESIDENT_PARAMETERS", 0)
    for found, wanted in zip(our_logits(folder, rows), resident, strict=True):
        np.testing.assert_array_equal(found, wanted)
