"""What the search takes out of an error because o_proj and down_proj will repair it."""

from __future__ import annotations

import torch

from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.model.block import Block
from qwen3_export.model.decoder import rope_tables
from qwen3_export.model.workers import Workers
from qwen3_export.solve.mixed_precision.compensation import fit_compensation, run_compensated
from tests.conftest import tiny_config, tiny_moe_config

TOKENS, ROWS = 24, 32


def random_block(values: dict[str, object], seed: int = 0) -> Block:
    config = parse_config(values, "test")
    generator = torch.Generator().manual_seed(seed)
    shapes = {**config.linear_shapes(0), **config.other_shapes(0)}
    weights = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return Block(config, 0, weights)


def rows(config: Qwen3Config) -> torch.Tensor:
    return torch.randn(ROWS, 1, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1))


def left(block: Block, changed: Block, stage: int, pool: Workers, count: int = ROWS) -> float:
    """The share of the error's energy that is left, on a row that nothing was fitted on."""
    hidden, rope = rows(block.config), rope_tables(block.config, 0, TOKENS)
    repairs = fit_compensation(block, changed, stage, rope, lambda row: hidden[row], count, 4, pool)
    errors = [run_compensated(block, changed, kept, rope, hidden[1])[2] for kept in (repairs, {})]
    return float(errors[0].square().sum() / errors[1].square().sum())


def test_what_o_proj_can_undo_is_taken_out(pool: Workers) -> None:
    """With an MLP that writes nothing, a scaled o_proj's error is a linear function of o_proj's inputs."""
    block = random_block(tiny_config())
    block.weights["mlp.down_proj"].zero_()
    changed = Block(block.config, 0, {**block.weights, "self_attn.o_proj": block.weights["self_attn.o_proj"] * 1.1})
    assert left(block, changed, 0, pool) < 1e-2
    assert left(block, changed, 1, pool) > 0.9


def test_what_down_proj_can_undo_is_taken_out_unless_experts_write_it(pool: Workers) -> None:
    block = random_block(tiny_config())
    changed = Block(block.config, 0, {**block.weights, "mlp.down_proj": block.weights["mlp.down_proj"] * 1.1})
    assert left(block, changed, 2, pool) < 1e-2
    assert left(block, changed, 3, pool) == 1
    sparse = random_block(tiny_moe_config())
    name = "mlp.experts.0.down_proj"
    assert left(sparse, Block(sparse.config, 0, {**sparse.weights, name: sparse.weights[name] * 1.1}), 2, pool) == 1


def test_without_held_out_rows_nothing_is_taken_out(pool: Workers) -> None:
    block = random_block(tiny_config())
    changed = Block(block.config, 0, {**block.weights, "self_attn.o_proj": block.weights["self_attn.o_proj"] * 1.1})
    assert left(block, changed, 0, pool, count=14) == 1


def test_an_error_that_no_input_tells_is_left(pool: Workers) -> None:
    """A wrong gate changes down_proj's inputs themselves: a linear function of the right ones tells little of it."""
    block = random_block(tiny_config())
    noise = torch.randn(block.weights["mlp.gate_proj"].shape, generator=torch.Generator().manual_seed(2)) / 8
    changed = Block(block.config, 0, {**block.weights, "mlp.gate_proj": block.weights["mlp.gate_proj"] + noise})
    assert 0.5 < left(block, changed, 2, pool) <= 1
