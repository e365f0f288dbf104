"""The compiled loops against torch's operations, and both against what they must keep: ties apart, the same codes.

A code may differ only where the number that is rounded stands within 1e-5 of the middle of two codes, as a share
of its own size where that is above one; all that follows in such a row may differ then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.methods.gptq import columns
from qwen3_export.solve.methods.gptq.columns import round_block, search_block
from qwen3_export.solve.rounding.grid import range_grid
from tests.unit.solve import torch_columns

TIE = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "signed": {"signed_scales": True},
}
ROWS, COLUMNS = (1, 31, 33, 70), (1, 5, 67, 127)
SHAPES = [(count, wide) for count in ROWS for wide in COLUMNS]
# Shares of the range that are tried; at 8 bits nothing is gained by leaving out much of it.
TRIED = {2: [1.06, 0.97, 0.88, 0.79, 0.7], 8: [1.002, 1.0, 0.998, 0.996, 0.994]}
every_scheme = pytest.mark.parametrize("kind", KINDS)
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def scheme_of(bits: int, kind: str) -> QuantScheme:
    return QuantScheme(num_bits=bits, group_size=128, **KINDS[kind])


class Case:
    """Weights `[n, rows]` of one block, its Hessian and factor U `[n, n]`, and some grids for each row."""

    def __init__(self, rows: int, wide: int, scheme: QuantScheme) -> None:
        generator = torch.Generator().manual_seed(1000 * rows + wide)
        mixing = torch.eye(wide) + torch.randn(wide, wide, generator=generator) / wide**0.5
        x = torch.randn(4 * wide + 8, wide, generator=generator) @ mixing
        self.scheme, self.hessian = scheme, x.T @ x / len(x) + 0.01 * torch.eye(wide)
        inverse = torch.linalg.inv(self.hessian.double())
        self.upper = torch.linalg.cholesky(inverse).T.float().contiguous()
        self.weight = torch.randn(wide, rows, generator=generator) * 0.05
        shrinks = torch.tensor(TRIED[8 if scheme.num_bits == 8 else 2]).reshape(-1, 1, 1)
        ends = torch.stack(torch.aminmax(self.weight, dim=0), -1).unsqueeze(1)
        self.tried = [values.squeeze(-1) for values in range_grid(ends, scheme, shrinks)]
        self.scales, self.zeros = (values[1].expand(wide, rows).contiguous() for values in self.tried)


def both(function: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What the compiled loops find, and what torch's operations do."""
    return function(columns), function(torch_columns)


def numbers_of(scheme: QuantScheme) -> torch.Tensor:
    """All codes of a codebook or a format of floats, in order, by ml_dtypes where that knows them."""
    if scheme.block_type is not None:
        return torch.tensor(scheme.block_type.values, dtype=torch.float32)
    kind, count = (ml_dtypes.float8_e4m3fn, 256) if scheme.num_bits == 8 else (ml_dtypes.float4_e2m1fn, 16)
    found = np.arange(count, dtype=np.uint8).view(kind).astype(np.float32)
    return torch.from_numpy(np.unique(found[np.isfinite(found)]))


def from_a_tie(exact: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """How far numbers are from the nearest middle of two codes, as a share of their size."""
    if scheme.type == "int":
        distance = (exact - exact.floor() - 0.5).abs()
    else:
        numbers = numbers_of(scheme).double()
        distance = (exact[..., None] - (numbers[1:] + numbers[:-1]) / 2).abs().amin(-1)
    return distance / exact.abs().clamp(min=1)


def assert_same_but_for_ties(
    found: torch.Tensor, wanted: torch.Tensor, exact: torch.Tensor, scheme: QuantScheme
) -> torch.Tensor:
    """In each row (a column here) the first difference is a tie; returns which rows have none."""
    different = found != wanted
    same = ~different.any(0)
    first = different.int().argmax(0)
    distance = from_a_tie(exact, scheme).gather(0, first[None])[0]
    assert (distance[~same] < TIE).all()
    assert (~same).sum() <= max(1, 0.05 * len(same))
    return same


def rounded(case: Case, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's recursion in fp64 for codes that are given: what is rounded, in units, and the errors."""
    rest, upper, scales = (m.double().clone() for m in (case.weight, case.upper, case.scales))
    exact, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(len(rest)):
        exact[j] = rest[j] / scales[j]
        errors[j] = (rest[j] - (codes[j] - case.zeros[j]) * scales[j]) / upper[j, j]
        rest[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return exact, errors


@every_scheme
@every_width
def test_a_block_is_rounded_as_by_torch(bits: int, kind: str) -> None:
    for rows, wide in SHAPES:
        case = Case(rows, wide, scheme_of(bits, kind))
        before = case.weight.clone()
        compiled, plain = both(
            lambda loops, case=case: loops.round_block(case.weight, case.scales, case.zeros, case.upper, case.scheme)
        )
        assert torch.equal(case.weight, before), "what is rounded is the caller's"
        exact, errors = rounded(case, plain[0])
        same = assert_same_but_for_ties(compiled[0], plain[0], exact, case.scheme)
        assert same.any() or rows == 1
        # fp32 sums of weights, of which the errors are a small part at 8 bits.
        size = 1e-5 * float(case.weight.abs().max())
        for found in (compiled[1], plain[1]):
            torch.testing.assert_close(found[:, same].double(), errors[:, same], rtol=1e-4, atol=size)
        assert compiled[0].min() >= 0
        assert compiled[0].max() <= case.scheme.max_code


@every_scheme
@every_width
def test_the_search_takes_the_candidate_that_torch_takes(bits: int, kind: str) -> None:
    chosen_of = set()
    for rows, wide in SHAPES:
        case = Case(rows, wide, scheme_of(bits, kind))
        compiled, plain = both(
            lambda loops, case=case: loops.search_block(case.weight, *case.tried, case.upper, case.scheme)
        )
        totals = [found[1].double().square().sum(0) for found in (compiled, plain)]
        scales = [case.tried[0].gather(0, found[2][None])[0] for found in (compiled, plain)]
        same = scales[0] == scales[1]
        torch.testing.assert_close(totals[0][~same], totals[1][~same], rtol=1e-4, atol=0)
        assert (~same).sum() <= max(1, 0.05 * rows)
        case.scales, case.zeros = (m.gather(0, plain[2][None]).expand(wide, rows) for m in case.tried)
        exact, _ = rounded(case, plain[0])
        alike = assert_same_but_for_ties(compiled[0][:, same], plain[0][:, same], exact[:, same], case.scheme)
        torch.testing.assert_close(totals[0][same][alike], totals[1][same][alike], rtol=1e-3, atol=1e-9)
        chosen_of |= set(compiled[2].tolist())
    assert len(chosen_of) > 2, "with one candidate for all nothing is searched"


@every_scheme
def test_the_search_leaves_each_row_the_least_error_of_its_candidates(kind: str) -> None:
    case = Case(70, 67, scheme_of(4, kind))
    codes, errors, chosen = search_block(case.weight, *case.tried, case.upper, case.scheme)
    totals = []
    for number in range(len(case.tried[0])):
        scales, zeros = (m[number].expand(67, 70).contiguous() for m in case.tried)
        alone = round_block(case.weight, scales, zeros, case.upper, case.scheme)
        totals.append(alone[1].square().sum(0))
        taken = chosen == number
        assert torch.equal(codes[:, taken], alone[0][:, taken])
        assert torch.equal(errors[:, taken], alone[1][:, taken])
    least = torch.stack(totals).amin(0)
    torch.testing.assert_close(errors.square().sum(0), least, rtol=1e-5, atol=0)


def costs(case: Case, codes: torch.Tensor) -> torch.Tensor:
    """(q − w)ᵀ H (q − w) of each row, in fp64."""
    delta = (codes.double() - case.zeros) * case.scales.double() - case.weight.double()
    return ((case.hessian.double() @ delta) * delta).sum(0)


def descended(case: Case, codes: torch.Tensor, loops: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes after one pass, and the steps of the values."""
    values, codes = (codes - case.zeros) * case.scales, codes.clone()
    slopes = case.hessian @ (values - case.weight)
    before = [m.clone() for m in (values, slopes)]
    steps = loops.descend_block(values, case.scales, case.zeros, case.hessian, slopes, codes, case.scheme)
    assert torch.equal(values, before[0])
    assert torch.equal(slopes, before[1])
    return codes, steps


def minimisers(case: Case, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What a pass rounds in fp64, in units, when it goes from the codes `before` to those `after`."""
    scales, hessian = case.scales.double(), case.hessian.double()
    values = (before.double() - case.zeros) * scales
    slopes, exact = hessian @ (values - case.weight.double()), torch.empty_like(values)
    for j in range(len(values)):
        exact[j] = (values[j] - slopes[j] / hessian[j, j]) / scales[j]
        slopes += hessian[:, j, None] * ((after[j] - before[j]) * scales[j])
    return exact


@every_scheme
@every_width
def test_a_block_descends_as_by_torch_and_never_uphill(bits: int, kind: str) -> None:
    fell = 0
    for rows, wide in SHAPES:
        case = Case(rows, wide, scheme_of(bits, kind))
        nearest = (case.weight / case.scales).round().add(case.zeros).clamp(0, case.scheme.max_code)
        codes, before = nearest, costs(case, nearest)
        for _ in range(2):
            compiled, plain = both(lambda loops, case=case, codes=codes: descended(case, codes, loops))
            assert_same_but_for_ties(compiled[0], plain[0], minimisers(case, codes, plain[0]), case.scheme)
            torch.testing.assert_close(compiled[1], (compiled[0] - codes) * case.scales)
            after = costs(case, compiled[0])
            assert (after <= before * (1 + 1e-5)).all()
            fell += int((after < 0.99 * before).sum())
            codes, before = compiled[0], after
        assert codes.min() >= 0
        assert codes.max() <= case.scheme.max_code
    assert fell > 100, "a pass that changes nothing proves nothing"


OTHERS = {
    "iq4_nl": QuantScheme(num_bits=4, type="kquant", ggml_type="iq4_nl"),
    "iq4_xs": QuantScheme(num_bits=4, type="kquant", ggml_type="iq4_xs"),
    "e2m1": QuantScheme(num_bits=4, type="float", group_size=16, scale_dtype="e4m3"),
    "e4m3": QuantScheme(num_bits=8, type="float", strategy="channel"),
}
every_other = pytest.mark.parametrize("scheme", OTHERS.values(), ids=OTHERS.keys())


def case_of(rows: int, wide: int, scheme: QuantScheme) -> Case:
    """A case without zero points; the scales of every other row are negative."""
    case, sign = Case(rows, wide, scheme_of(4, "symmetric")), torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    case.scheme, case.zeros = scheme, torch.zeros(wide, rows)
    case.scales = (case.weight.abs().amax(0) / numbers_of(scheme).abs().max() * sign).expand(wide, rows).contiguous()
    case.tried = [torch.stack([case.scales[0] * share for share in TRIED[2]]), torch.zeros(len(TRIED[2]), rows)]
    return case


@every_other
def test_floats_and_codebooks_are_solved_as_by_torch(scheme: QuantScheme) -> None:
    fell, chosen = 0, set()
    for rows, wide in SHAPES:
        case = case_of(rows, wide, scheme)
        compiled, plain = both(
            lambda loops, case=case: loops.round_block(case.weight, case.scales, case.zeros, case.upper, case.scheme)
        )
        exact, errors = rounded(case, plain[0])
        same = assert_same_but_for_ties(compiled[0], plain[0], exact, scheme)
        size = 1e-5 * float(case.weight.abs().max())
        for found in (compiled[1], plain[1]):
            torch.testing.assert_close(found[:, same].double(), errors[:, same], rtol=1e-4, atol=size)
        searched = both(lambda loops, case=case: loops.search_block(case.weight, *case.tried, case.upper, case.scheme))
        totals = [found[1].square().sum(0) for found in searched]
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-2, atol=0)
        chosen |= set(searched[0][2].tolist())
        codes, before = compiled[0], costs(case, compiled[0])
        compiled, plain = both(lambda loops, case=case, codes=codes: descended(case, codes, loops))
        assert_same_but_for_ties(compiled[0], plain[0], minimisers(case, codes, plain[0]), scheme)
        after = costs(case, compiled[0])
        assert (after <= before * (1 + 1e-5)).all()
        fell += int((after < 0.99 * before).sum())
        assert torch.isin(compiled[0], numbers_of(scheme)).all()
    assert fell > 20, "a pass that changes nothing proves nothing"
    assert len(chosen) > 2, "with one candidate for all nothing is searched"


@every_other
def test_every_number_and_every_middle_of_two_is_rounded_as_by_torch(scheme: QuantScheme) -> None:
    """Bit for bit, negative zeros of floats too: a file stores them as other codes."""
    numbers = numbers_of(scheme)
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([torch.nextafter(middles, torch.full_like(middles, end)) for end in (-1e9, 1e9)])
    weight = torch.cat([numbers, middles, near, torch.tensor([-0.0, -1e9, 1e9, -1e-30, 1e-30])])[None]
    ones = torch.ones_like(weight)
    found = both(lambda loops: loops.round_block(weight, ones, 0 * ones, torch.eye(1), scheme)[0])
    assert torch.equal(*(codes.view(torch.int32) for codes in found))
    assert torch.equal(found[0][0, : len(numbers)], numbers)
    assert set(found[0][0].tolist()) == set(numbers.tolist())
