"""Moments against the plain means in fp64: of fp32 samples to its last digits, of rounded ones to some thousandths,
where the choice of as many tokens alone makes a hundred times as much."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.calibration.collect import collect_moments, collect_moments_of_parts
from qwen3_export.solve.calibration.moments import Moments, SampleInputs
from tests.unit.processors import needs_avx2

OUT, ROWS, LENGTH, AT_ONCE = 24, 20, 301, 8
# One strip of columns, and three.
SIZES = (96, 520)
LOUD = [3, 40, 41, 95]
FIELDS = ("hessian", "drift", "target", "mean_abs", "peak")
# Bytes have seven bits and a sign, or six.
BOUND = {torch.bfloat16: 4e-3, torch.float32: 8e-3}
Take = Callable[[int], SampleInputs]
# What becomes bytes: bf16 inputs, and fp32 inputs where integers are multiplied.
ROUNDED = [
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float32, True, id="integers", marks=needs_avx2),
]
as_bytes = pytest.mark.parametrize(("dtype", "int_matmul"), ROUNDED)
every_kind = pytest.mark.parametrize(("dtype", "int_matmul"), [pytest.param(torch.float32, False, id="fp32"), *ROUNDED])


class Tokens:
    """Inputs of all rows `[n, size]`, the original's distance from them, and wanted answers `[n, out]`."""

    def __init__(self, size: int, dtype: torch.dtype, rows: int = ROWS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
        x = torch.randn(rows * LENGTH, size, generator=generator) @ mixing
        drift = 0.1 * x.roll(1, 1) + 0.1 * torch.randn(x.shape, generator=generator)
        target = x @ torch.randn(size, OUT, generator=generator)
        self.x, self.drift, self.target = (values.to(dtype) for values in (x, drift, target))

    def sample(self, beside: bool, row: int) -> SampleInputs:
        part = slice(LENGTH * row, LENGTH * row + LENGTH)
        return SampleInputs(self.x[part], self.drift[part], self.target[part]) if beside else SampleInputs(self.x[part])

    def wanted(self, rows: range) -> dict[str, torch.Tensor]:
        part = slice(LENGTH * rows.start, LENGTH * rows.stop)
        x, drift, target = (values[part].double() for values in (self.x, self.drift, self.target))
        means = {name: left.T @ x / len(x) for name, left in (("hessian", x), ("drift", drift), ("target", target))}
        return {**means, "mean_abs": x.abs().mean(0), "peak": x.abs().amax(0)}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", SIZES)
def test_moments_are_the_plain_means(pool: Workers, size: int) -> None:
    tokens = Tokens(size, torch.float32)
    found = collect_moments(partial(tokens.sample, True), range(ROWS), AT_ONCE, size, "cpu", pool)
    assert found.tokens == ROWS * LENGTH
    for name, wanted in tokens.wanted(range(ROWS)).items():
        torch.testing.assert_close(getattr(found, name).double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.hessian, found.hessian.T)


@as_bytes
@pytest.mark.parametrize("size", SIZES)
def test_moments_of_rounded_samples_are_the_plain_means_to_some_thousandths(
    pool: Workers, dtype: torch.dtype, int_matmul: bool, size: int
) -> None:
    rows = range(2 * ROWS)
    tokens = Tokens(size, dtype, len(rows))
    found = collect_moments(partial(tokens.sample, True), rows, AT_ONCE, size, "cpu", pool, int_matmul=int_matmul)
    wanted = tokens.wanted(rows)
    for name in ("hessian", "drift", "target", "mean_abs"):
        assert getattr(found, name).dtype == torch.float32
        assert distance(getattr(found, name), wanted[name]) < BOUND[dtype], name
    assert torch.equal(found.peak.double(), wanted["peak"])
    assert torch.equal(found.hessian, found.hessian.T)


@as_bytes
@pytest.mark.parametrize("size", SIZES)
def test_what_a_few_loud_inputs_have_in_common_leaves_the_hessian_definite(
    pool: Workers, dtype: torch.dtype, int_matmul: bool, size: int
) -> None:
    """A few inputs a thousand times as large as the others, and nearly the same number everywhere."""
    tokens = Tokens(size, dtype)
    generator = torch.Generator().manual_seed(9)
    common = 1000 * torch.randn(ROWS * LENGTH, 1, generator=generator)
    nearly = 1 + 0.004 * torch.randn(ROWS * LENGTH, len(LOUD), generator=generator)
    tokens.x[:, LOUD] = (common * nearly).to(dtype)
    found = collect_moments(
        partial(tokens.sample, False), range(ROWS), AT_ONCE, size, "cpu", pool, int_matmul=int_matmul
    ).hessian
    own = tokens.x[:, LOUD].double()
    block, wanted = found[LOUD][:, LOUD].double(), own.T @ own / len(own)
    assert distance(block, wanted) < 1e-3
    # Products that are rounded to 16 bits would hide by how little these inputs differ, and more.
    assert float(torch.linalg.eigvalsh(block)[0]) > 0
    assert torch.linalg.cholesky_ex(with_damping(found)).info == 0
    quiet = [i for i in range(size) if i not in LOUD]
    own = tokens.x[:, quiet].double()
    assert distance(found[quiet][:, quiet], own.T @ own / len(own)) < 5e-3


def with_damping(hessian: torch.Tensor) -> torch.Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    return damped


@as_bytes
@pytest.mark.parametrize("size", SIZES)
def test_rows_whose_tokens_are_nearly_the_same_leave_the_hessian_definite(
    pool: Workers, dtype: torch.dtype, int_matmul: bool, size: int
) -> None:
    """As attention does with random weights: a hundred times the rest is common to all tokens of a row."""
    tokens, generator = Tokens(size, dtype), torch.Generator().manual_seed(5)
    own = torch.randn(ROWS, 1, size, generator=generator) * 100
    tokens.x = (own + tokens.x.float().reshape(ROWS, LENGTH, size)).reshape(-1, size).to(dtype)
    found = collect_moments(
        partial(tokens.sample, True), range(ROWS), AT_ONCE, size, "cpu", pool, int_matmul=int_matmul
    )
    wanted = tokens.wanted(range(ROWS))
    assert torch.linalg.eigvalsh(found.hessian.double())[0] > -1e-6 * found.hessian.diagonal().max()
    assert torch.linalg.cholesky_ex(with_damping(found.hessian)).info == 0
    # The drift is a hundred times smaller than what it is multiplied with.
    for name, bound in (("hessian", 1e-3), ("drift", 1e-2), ("target", 1e-3)):
        assert distance(getattr(found, name), wanted[name]) < bound, name


@as_bytes
@pytest.mark.parametrize("rows", [8, 300])
def test_centers_of_many_rows_are_added_together(
    pool: Workers, dtype: torch.dtype, int_matmul: bool, rows: int
) -> None:
    """More rows than are kept, and one that reaches fewer tokens than would be rounded."""
    tokens = Tokens(96, dtype, rows)
    found = collect_moments(partial(tokens.sample, True), range(rows), AT_ONCE, 96, "cpu", pool, int_matmul=int_matmul)
    for name in ("hessian", "drift", "target"):
        assert distance(getattr(found, name), tokens.wanted(range(rows))[name]) < BOUND[dtype], name


def test_few_tokens_are_summed_in_fp32(pool: Workers) -> None:
    """A short text brings few tokens in few directions, where no rounding averages out."""
    size, count = 128, 200
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(count, 4, generator=generator) @ torch.randn(4, size, generator=generator)
    x = (common + 0.01 * torch.randn(count, size, generator=generator)).bfloat16()
    few, exact = (
        collect_moments(lambda _, x=values: SampleInputs(x), range(1), AT_ONCE, size, "cpu", pool)
        for values in (x, x.float())
    )
    assert torch.equal(few.hessian, exact.hessian)
    assert few.mean_abs is not None
    assert exact.mean_abs is not None
    torch.testing.assert_close(few.mean_abs, exact.mean_abs, rtol=1e-5, atol=0)


@as_bytes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_no_number_makes_its_moments_none(
    pool: Workers, dtype: torch.dtype, int_matmul: bool, bad: float
) -> None:
    tokens = Tokens(96, dtype)
    tokens.x[1000, 17] = bad
    found = collect_moments(
        partial(tokens.sample, False), range(ROWS), AT_ONCE, 96, "cpu", pool, int_matmul=int_matmul
    ).hessian
    assert not torch.isfinite(found[17]).any()
    others = [i for i in range(96) if i != 17]
    assert torch.isfinite(found[others][:, others]).all()


@every_kind
@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_threads_changes_no_bit(size: int, dtype: torch.dtype, int_matmul: bool) -> None:
    tokens, found = Tokens(size, dtype), []
    for threads in (1, 2, 3):
        with workers(threads) as pool:
            found.append(
                collect_moments(
                    partial(tokens.sample, True), range(ROWS), AT_ONCE, size, "cpu", pool, int_matmul=int_matmul
                )
            )
    for other in found[1:]:
        assert_equal(other, found[0])


def assert_equal(found: Moments, wanted: Moments) -> None:
    assert found.tokens == wanted.tokens
    for name in FIELDS:
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None and other is None) or torch.equal(one, other), name


@every_kind
def test_parts_are_collected_as_each_is_alone(pool: Workers, dtype: torch.dtype, int_matmul: bool) -> None:
    first, second = Tokens(96, dtype), Tokens(96, dtype, seed=1)
    parts: list[tuple[Take, list[int]]] = [
        (partial(first.sample, True), [1, 3, 5, 7, 9, 11, 13, 17, 19]),
        (partial(first.sample, True), [15]),
        (partial(second.sample, False), []),
        (partial(second.sample, False), list(range(0, ROWS, 2))),
    ]
    together = collect_moments_of_parts(parts, 4, 96, "cpu", pool, int_matmul=int_matmul)
    assert [part.tokens // LENGTH for part in together] == [9, 1, 0, 10]
    for found, (sample, rows) in zip(together, parts, strict=True):
        assert_equal(found, collect_moments(sample, rows, 4, 96, "cpu", pool, int_matmul=int_matmul))
    assert together[0].drift is not None
    assert together[3].drift is None
    assert not together[2].hessian.any()


def test_sizes_are_left_out_where_nobody_asks(pool: Workers) -> None:
    tokens = Tokens(96, torch.float32)
    found = collect_moments(partial(tokens.sample, False), range(ROWS), AT_ONCE, 96, "cpu", pool, magnitudes=False)
    assert found.mean_abs is None
    assert found.peak is None
    with_sizes = collect_moments(partial(tokens.sample, False), range(ROWS), AT_ONCE, 96, "cpu", pool)
    assert torch.equal(found.hessian, with_sizes.hessian)


def test_joined_parts_are_the_moments_of_all_rows(pool: Workers) -> None:
    tokens = Tokens(96, torch.float32)
    cut = [
        collect_moments(partial(tokens.sample, True), rows, 4, 96, "cpu", pool) for rows in (range(13), range(13, ROWS))
    ]
    joined = cut[0].join(cut[1])
    assert joined.tokens == ROWS * LENGTH
    for name, wanted in tokens.wanted(range(ROWS)).items():
        torch.testing.assert_close(getattr(joined, name).double(), wanted, rtol=1e-4, atol=1e-4)
    alone = collect_moments(partial(tokens.sample, False), range(3), 4, 96, "cpu", pool)
    assert cut[0].join(alone).drift is None


def test_a_row_that_cannot_be_had_stops_the_collection(pool: Workers) -> None:
    tokens = Tokens(96, torch.float32)

    def sample(row: int) -> SampleInputs:
        if row == 11:
            raise ValueError("row 11")
        return tokens.sample(False, row)

    with pytest.raises(ValueError, match="row 11"):
        collect_moments(sample, range(ROWS), 4, 96, "cpu", pool)
