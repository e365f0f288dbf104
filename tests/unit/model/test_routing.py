"""The router's choice, and what it is on average under noise."""

from __future__ import annotations

import pytest
import torch

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.model.routing import route
from tests.conftest import tiny_moe_config

NOISE = 0.2


def config(normalised: bool = True, chosen: int = 2) -> object:
    return parse_config(tiny_moe_config(num_experts=4, num_experts_per_tok=chosen, norm_topk_prob=normalised), "test")


def full(logits: torch.Tensor, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weights by expert, zero for those that are not chosen."""
    return torch.zeros_like(logits).scatter(-1, found["experts"], found["mix"])


@pytest.mark.parametrize("normalised", [True, False])
def test_smoothed_weights_are_the_mean_over_noise(normalised: bool) -> None:
    logits = torch.tensor([[3.0, 0.12, 0.0, -2.0]])
    found = full(logits, route(logits, config(normalised), NOISE))
    deviation = NOISE * (logits - logits.mean()).square().mean().sqrt()
    moved = 0.12 + deviation * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    # The noise says which of the two is chosen; weights are those of the logits themselves.
    share = float((moved < 0).float().mean())
    assert 0.2 < share < 0.5
    probabilities = logits.softmax(-1)[0]
    usual, other = (probabilities * torch.tensor(kept) for kept in ([1.0, 1, 0, 0], [1.0, 0, 1, 0]))
    if normalised:
        usual, other = usual / usual.sum(), other / other.sum()
    wanted = (1 - share) * usual + share * other
    assert torch.allclose(found[0], wanted, atol=3e-3)


def test_the_smoothed_choice_does_not_jump_where_two_experts_are_equal() -> None:
    near = [torch.tensor([[2.0, 1.0 + step, 1.0, -1.0]]) for step in (-1e-5, 1e-5)]
    hard, soft = ([full(x, route(x, config(), noise)) for x in near] for noise in (0.0, NOISE))
    assert float((hard[0] - hard[1]).abs().max()) > 0.2
    assert float((soft[0] - soft[1]).abs().max()) < 1e-4


def test_the_slope_is_that_of_the_smoothed_weights() -> None:
    logits = torch.tensor([[2.0, 1.1, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)

    def value(given: torch.Tensor) -> torch.Tensor:
        return (full(given, route(given, config(), NOISE)) * weights).sum()

    (slope,) = torch.autograd.grad(value(logits), logits)
    step = torch.zeros_like(logits)
    step[0, 1] = 1e-4
    with torch.no_grad():
        measured = float(value(logits + step) - value(logits - step)) / 2e-4
    # The noise follows the size of the logits, whose own slope is left out.
    assert float(slope[0, 1]) == pytest.approx(measured, rel=0.05)


def test_without_noise_and_where_all_experts_work_it_is_the_plain_choice() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    plain = route(logits, config())
    mix, experts = logits.softmax(-1).topk(2, -1)
    assert torch.equal(plain["experts"], experts)
    assert torch.equal(plain["mix"], mix / mix.sum(-1, keepdim=True))
    everywhere, noisy = (route(logits, config(chosen=4), noise) for noise in (0.0, NOISE))
    assert torch.equal(everywhere["mix"], noisy["mix"])
