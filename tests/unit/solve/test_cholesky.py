"""The factor that GPTQ runs along against the inverse of the damped Hessian in fp64, over several strips of columns."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from qwen3_export.errors import RecipeError
from qwen3_export.model.workers import workers
from qwen3_export.solve.methods.gptq import cholesky
from qwen3_export.solve.methods.gptq.cholesky import Factor, factorise
from qwen3_export.solve.methods.gptq.refine import group_order

SIZE, GROUP, PERCDAMP = 1168, 16, 0.01
ORDERS = ("as they are", "by mass", "by groups")
DEAD = (0, 700, SIZE - 1)


@cache
def hessian() -> torch.Tensor:
    """Correlated inputs of unlike size, three of which never arrived."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5 + torch.eye(SIZE)
    x = torch.randn(2 * SIZE, SIZE, generator=generator) @ mixing
    x *= torch.randn(SIZE, generator=generator).mul(0.7).exp()
    x[:, DEAD] = 0
    return x.T @ x / len(x)


@cache
def factor_of(chosen: str, threads: int | None) -> Factor:
    order = group_order(hessian(), GROUP) if chosen == "by groups" else None
    # Without a pool too, torch must not split an operation over threads of its own.
    with workers(threads or 1) as pool:
        return factorise(hessian(), PERCDAMP, chosen == "by mass", "linear", order, pool if threads else None)


@pytest.mark.parametrize("chosen", ORDERS)
def test_the_factor_times_itself_is_the_inverse_of_the_damped_hessian_in_that_order(chosen: str) -> None:
    assert SIZE > 2 * cholesky._STRIP
    assert SIZE % cholesky._STRIP
    found = factor_of(chosen, None)
    exact = hessian().double().numpy()
    damped = exact + np.diag(np.where(exact.diagonal() == 0, 1.0, PERCDAMP * exact.diagonal().mean()))
    order, upper = found.order.numpy(), found.upper.double().numpy()
    assert sorted(order) == list(range(SIZE))
    wanted = np.linalg.inv(damped[np.ix_(order, order)])
    np.testing.assert_array_equal(upper, np.triu(upper))
    assert (upper.diagonal() > 0).all()
    np.testing.assert_allclose(upper.T @ upper, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(upper, np.linalg.cholesky(wanted).T, rtol=0, atol=1e-4 * upper.max())
    np.testing.assert_allclose(found.damped, damped[np.ix_(order, order)], rtol=1e-6)


def test_the_order_is_the_one_that_was_asked_for() -> None:
    mass = -hessian().diagonal().numpy()
    np.testing.assert_array_equal(factor_of("as they are", None).order, np.arange(SIZE))
    np.testing.assert_array_equal(factor_of("by mass", None).order, np.argsort(mass, kind="stable"))
    np.testing.assert_array_equal(factor_of("by groups", None).order, group_order(hessian(), GROUP))


@pytest.mark.parametrize("chosen", ORDERS)
def test_the_number_of_threads_changes_no_bit(chosen: str) -> None:
    alone = factor_of(chosen, None)
    for threads in (1, 3):
        found = factor_of(chosen, threads)
        for name in ("order", "upper", "damped"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), (threads, name)


def test_the_hessian_itself_is_left_as_it_was() -> None:
    before = hessian().clone()
    with workers(2) as pool:
        factorise(hessian(), PERCDAMP, True, "linear", None, pool)
    assert torch.equal(hessian(), before)


def test_a_hessian_that_is_not_definite_is_refused_in_a_pool_too() -> None:
    wrong = hessian().clone()
    wrong[3, 4] = wrong[4, 3] = 10 * wrong.diagonal().max()
    with workers(2) as pool, pytest.raises(RecipeError, match="linear: the Hessian of its inputs is not positive"):
        factorise(wrong, PERCDAMP, True, "linear", None, pool)
