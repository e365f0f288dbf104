"""The shifted target against ridge regression in fp64 on the tokens themselves, in both of its forms.

drift     for linears that read what the residual stream was normed to
target    for those that write to it: what the original has behind them, less the stream that theirs is added to
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.calibration.moments import Moments, PairedMoments
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods import gptq
from qwen3_export.solve.methods.gptq.target_shift import (
    CONFIRM_EVERY,
    ROWS_AT_ONCE,
    TargetShift,
    start_shift_factors,
    target_shift_of,
)

# More rows than are shifted at once, and an odd number of them.
OUT, IN, TOKENS, PERCDAMP = ROWS_AT_ONCE + 101, 96, 400, 0.01
FORMS = {"drift": False, "target": True}
every_form = pytest.mark.parametrize("writes", FORMS.values(), ids=FORMS)


class Case(NamedTuple):
    """Inputs in the quantized model and in the original, R̃ − R, and a weight."""

    x: torch.Tensor
    original: torch.Tensor
    gap: torch.Tensor
    weight: torch.Tensor

    def contrary(self) -> Case:
        """Tokens whose original says the opposite."""
        return self._replace(original=2 * self.x - self.original, gap=-self.gap)

    def moments(self, writes: bool) -> Moments:
        count, hessian = len(self.x), self.x.T @ self.x / len(self.x)
        if writes:
            return Moments(count, hessian, target=(self.original @ self.weight.T + self.gap).T @ self.x / count)
        return Moments(count, hessian, drift=(self.original - self.x).T @ self.x / count)

    def missing(self, writes: bool) -> torch.Tensor:
        """W D + R in fp64: what the outputs lack, against the inputs; R only where the linear writes."""
        x, original, gap, weight = (m.double() for m in self)
        lacking = (original - x) @ weight.T + (gap if writes else 0)
        return lacking.T @ x / len(x)

    def hessian(self) -> torch.Tensor:
        return self.x.double().T @ self.x.double() / len(self.x)

    def step(self, writes: bool) -> torch.Tensor:
        """(W D + R)(H + λI)⁻¹ in fp64."""
        hessian = self.hessian()
        damped = hessian + PERCDAMP * hessian.diagonal().mean() * torch.eye(IN)
        return torch.linalg.solve(damped, self.missing(writes).T).T


def case_of(seed: int, weight_seed: int = 0, noise: float = 0.2) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=generator)
    original = x + noise * torch.randn(TOKENS, IN, generator=generator) @ torch.diag(torch.linspace(0, 1, IN))
    fixed = torch.Generator().manual_seed(weight_seed)
    gap = 0.1 * x @ torch.randn(IN, OUT, generator=fixed)
    return Case(x, original + 0.3 * x.roll(1, 1), gap, torch.randn(OUT, IN, generator=fixed))


def compared(fitted: Case, held_out: Case, writes: bool) -> PairedMoments:
    parts = fitted.moments(writes), held_out.moments(writes)
    return PairedMoments(*parts, parts[0].join(parts[1]))


def shift_of(moments: PairedMoments, pool: Workers) -> TargetShift:
    shift = target_shift_of(moments, start_shift_factors(moments, PERCDAMP, pool), pool)
    assert shift is not None
    return shift


@every_form
def test_the_shifted_target_is_the_ridge_solution(pool: Workers, writes: bool) -> None:
    """Where what is held out is what was fitted, the whole step is confirmed: α is 1."""
    case = case_of(5)
    found = shift_of(compared(case, case, writes), pool).target(case.weight, pool)
    wanted = case.weight.double() + case.step(writes)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)
    assert (wanted - case.weight).abs().max() > 0.1


def test_the_target_of_a_writer_says_what_drift_and_residual_say(pool: Workers) -> None:
    """W + (W D + R)(H + λI)⁻¹, D and R from the tokens: as a drift where R is 0, as a target in any case."""
    case = case_of(11)._replace(gap=torch.zeros(TOKENS, OUT))
    by_target, by_drift = (
        shift_of(compared(case, case, writes), pool).target(case.weight, pool) for writes in (True, False)
    )
    torch.testing.assert_close(by_target, by_drift, rtol=0, atol=2e-4)


@every_form
def test_held_out_rows_shorten_the_step_that_all_rows_want(pool: Workers, writes: bool) -> None:
    fitted, held_out = case_of(6, noise=2.0), case_of(7, noise=2.0)
    joined = Case(*(torch.cat(pair) for pair in list(zip(fitted, held_out, strict=True))[:3]), fitted.weight)
    some = slice(None, None, CONFIRM_EVERY)
    step, missing = fitted.step(writes)[some], held_out.missing(writes)[some]
    alpha = float((step * missing).sum() / ((step @ held_out.hessian()) * step).sum())
    assert 0.1 < alpha < 0.9
    found = shift_of(compared(fitted, held_out, writes), pool).target(fitted.weight, pool)
    wanted = fitted.weight.double() + alpha * joined.step(writes)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


@every_form
def test_the_shift_is_refused_when_held_out_rows_contradict_it(pool: Workers, writes: bool) -> None:
    case = case_of(6)
    found = shift_of(compared(case, case.contrary(), writes), pool).target(case.weight, pool)
    assert torch.equal(found, case.weight)


@every_form
def test_nothing_is_shifted_without_held_out_rows(pool: Workers, writes: bool) -> None:
    case, scheme = case_of(7), QuantScheme(num_bits=4, group_size=32)
    fitted, nothing = case.moments(writes), Moments(0, torch.zeros(IN, IN), torch.zeros(IN, IN), torch.zeros(OUT, IN))
    alone = PairedMoments(fitted, nothing, fitted)
    assert start_shift_factors(alone, PERCDAMP, pool) == []
    solved = []
    for moments in (alone, None, compared(case, case, writes)):
        group = LinearGroup({"linear": case.weight}, {"linear": scheme}, fitted.hessian, TOKENS, moments)
        options = gptq.Options(target_shift=True)
        solved.append(gptq.solve(group, options, pool)["linear"].tensor.codes.tobytes())
    assert solved[0] == solved[1] != solved[2]


@every_form
def test_nothing_is_shifted_where_a_hessian_is_not_definite(pool: Workers, writes: bool) -> None:
    case = case_of(8)
    good = compared(case, case, writes)
    wrong = good.fitted.hessian - 2 * torch.eye(IN)
    bad = PairedMoments(Moments(TOKENS, wrong, good.fitted.drift, good.fitted.target), good.held_out, good.both)
    assert target_shift_of(bad, start_shift_factors(bad, PERCDAMP, pool), pool) is None


@every_form
def test_the_number_of_threads_changes_no_bit(writes: bool) -> None:
    fitted, held_out, found = case_of(9), case_of(10), []
    for threads in (1, 3):
        with workers(threads) as pool:
            found.append(shift_of(compared(fitted, held_out, writes), pool).target(fitted.weight, pool))
    assert torch.equal(*found)


@every_form
def test_a_wide_linear_has_the_same_codes_and_gives_its_moments_up(
    pool: Workers, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, held_out = case_of(12, noise=2.0), case_of(13, noise=2.0)
    found = []
    for wide in (IN, IN - 1):
        monkeypatch.setattr(gptq, "WIDE", wide)
        moments = compared(fitted, held_out, writes)
        moments.both = moments.both if wide == IN else None
        group = LinearGroup(
            {"linear": fitted.weight}, {"linear": QuantScheme(4, group_size=32)}, fitted.moments(writes).hessian,
            TOKENS, moments,
        )  # fmt: skip
        solved = gptq.solve(group, gptq.Options(target_shift=True), pool)["linear"]
        found.append((solved.tensor.codes.tobytes(), solved.tensor.scales.tobytes(), solved.error))
        assert hasattr(moments, "held_out") == (wide == IN)
    assert found[0] == found[1]
