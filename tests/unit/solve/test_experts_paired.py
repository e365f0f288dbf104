"""Experts with the original beside: the same tokens of both models, and what all experts together leave missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_export.core.architecture import ROUTER
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import ExpertRule, Recipe
from qwen3_export.model.decoder import load_block, rope_tables, to_torch
from qwen3_export.solve.blocks.paired import _share
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.quantize import quantize
from tests.conftest import copy_tokenizer, write_checkpoint
from tests.unit.solve.support import CONFIGS, inputs_of_linears, spied
from tests.unit.solve.test_paired import BESIDE, HELD_OUT, LENGTH, SETTINGS, close, parts_of, samples_of, shifted

EVERY = 2
FITTED = [row for row in BESIDE[EVERY] if row != HELD_OUT]
PREFIX = f"{block_name(0)}.mlp.experts."


@pytest.fixture(params=[True, False], ids=["mix normed", "mix as it is"])
def source(request: pytest.FixtureRequest, tmp_path: Path, reference_folder: Path) -> Path:
    """A model whose first block has four experts, two of them at a time."""
    config = {**CONFIGS["moe"], "norm_topk_prob": request.param}
    return copy_tokenizer(reference_folder, write_checkpoint(tmp_path / "source", config))


def groups_of(source: Path, output: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, LinearGroup]:
    """The experts' groups of the first block as GPTQ saw them."""
    run = spied(monkeypatch, lambda: quantize(open_checkpoint(source), recipe, output, SETTINGS))
    return {name: group for name, group in run.items() if name.startswith(PREFIX)}


def routed(x: torch.Tensor, checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's choice and its mix of every token, `[tokens, 2]`."""
    weight = to_torch(checkpoint.read(f"{block_name(0)}.{ROUTER}.weight")).double()
    mix, experts = (x.double() @ weight.T).softmax(-1).topk(2, dim=-1)
    return experts, mix / mix.sum(-1, keepdim=True) if checkpoint.config.norm_topk_prob else mix


@torch.no_grad()
def missing_of(source: Checkpoint, quantized: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    """What the first block leaves of the original's residual stream `[tokens, hidden]` with its down_proj as they were,
    by a plain forward pass."""
    hidden = to_torch(source.read("model.embed_tokens.weight")).float()[torch.from_numpy(ids.astype(np.int64))][None]
    rope, original, ours = rope_tables(source.config, 0, len(ids)), load_block(source, 0), load_block(quantized, 0)
    kept = {name: weight for name, weight in original.weights.items() if name.endswith("down_proj")}
    ours = replace(ours, weights={**ours.weights, **kept})
    return (original.forward(hidden, rope) - ours.forward(hidden, rope))[0]


def test_an_expert_is_compared_on_the_tokens_that_reach_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_products: None
) -> None:
    groups, original = groups_of(source, tmp_path / "out", shifted(EVERY), monkeypatch), open_checkpoint(source)
    rows, quantized = samples_of(source), open_checkpoint(tmp_path / "out")
    ours, theirs = (inputs_of_linears(checkpoint.folder, rows, monkeypatch) for checkpoint in (quantized, original))
    router = f"{block_name(0)}.{ROUTER}"
    experts, mix = routed(ours[router], original)
    missing = torch.cat([missing_of(original, quantized, ids) for ids in rows]).double()
    assert len(groups) == 4 * 3
    for name, group in groups.items():
        assert group.paired is not None
        everywhere = ours[name].double()
        close(group.hessian, everywhere.T @ everywhere / len(everywhere))
        chosen = experts == int(name.removeprefix(PREFIX).split(".")[0])
        place = chosen.any(-1).cumsum(0) - 1
        for part, some in (
            (group.paired.fitted, FITTED),
            (group.paired.held_out, [HELD_OUT]),
            (group.paired.both, BESIDE[EVERY]),
        ):
            tokens = parts_of(torch.arange(len(chosen))[:, None], some).long()[:, 0]
            tokens = tokens[chosen[tokens].any(-1)]
            x = everywhere[place[tokens]]
            assert part.tokens == len(tokens) > 0
            close(part.hessian, x.T @ x / len(x))
            if name.endswith("down_proj"):
                share = (mix * chosen).sum(-1) / mix.square().sum(-1)
                weight = to_torch(original.read(f"{name}.weight")).double()
                wanted = x @ weight.T + missing[tokens] * share[tokens][:, None]
                assert part.target is not None
                close(part.target, wanted.T @ x / len(x))
                # Not only its own answer, which is most of it.
                own = (x @ weight.T).T @ x / len(x)
                assert float((wanted.T @ x / len(x) - own).norm()) > 1e-3 * float(own.norm())
            else:
                assert part.drift is not None
                close(part.drift, (theirs[router][tokens].double() - x).T @ x / len(x))


def test_an_expert_that_few_tokens_reach_is_not_shifted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_floor = SETTINGS.samples * LENGTH // 2
    recipe = replace(shifted(EVERY), experts=ExpertRule(min_tokens=token_floor))
    groups = groups_of(source, tmp_path / "out", recipe, monkeypatch)
    assert {group.paired is None for group in groups.values()} == {True, False}
    for group in groups.values():
        assert (group.paired is None) == (group.tokens < token_floor)


def test_its_answers_make_up_for_what_is_missing() -> None:
    """The share of the module's docstring, added up over a token's experts, is the whole; and the least that is."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(40)])[None]
    mix = torch.rand(1, 40, 3, generator=generator)
    missing = torch.randn(1, 40, 7, generator=generator)
    made, sizes = torch.zeros(40, 7), torch.zeros(40)
    for expert in range(5):
        chosen = experts[0] == expert
        tokens = chosen.any(-1)
        share = _share(mix[0][tokens], missing[0][tokens], chosen[tokens].long().argmax(-1))
        made[chosen.any(-1)] += mix[0][chosen][:, None] * share
        sizes[chosen.any(-1)] += share.square().sum(-1)
    torch.testing.assert_close(made, missing[0])
    least = torch.stack([torch.linalg.pinv(mix[0, token][None]) @ missing[0, token][None] for token in range(40)])
    torch.testing.assert_close(sizes, least.square().sum((1, 2)))
