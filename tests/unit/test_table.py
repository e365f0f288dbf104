"""The ranges that the table of errors chooses are those of the plain loop, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.grid import _SHRINK, _table_errors, _try_all, cut, find_grid
from qwen3_export.solve.table import cheapest, stored_bits

SCHEMES = [
    QuantScheme(4, group_size=128),
    QuantScheme(4, group_size=32, scale_dtype="fp16"),
    QuantScheme(3, group_size=64),
    QuantScheme(2, group_size=32),
    QuantScheme(8, group_size=128),
    QuantScheme(8, strategy="channel"),
    QuantScheme(4, strategy="channel", signed_scales=True),
    QuantScheme(4, group_size=64, symmetric=False),
    QuantScheme(8, strategy="block", activations="dynamic-token"),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.label}-{scheme.scale_dtype}")


def weights(kind: str) -> torch.Tensor:
    """bf16 weights `[64, 512]`: of one size, heavy-tailed, or of sizes beyond what a scale can be."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(64, 512, generator=generator)
    if kind == "heavy":
        weight *= torch.exp(torch.randn(weight.shape, generator=generator))
    if kind == "all sizes":
        weight *= torch.exp(8 * torch.randn(64, 1, generator=generator))
        weight[7], weight[9, :128] = 0, 1e-30
    return weight.bfloat16()


@by_scheme
@pytest.mark.parametrize("kind", ["normal", "heavy", "all sizes"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_grid_is_that_of_the_plain_loop(scheme: QuantScheme, kind: str, weighted: bool) -> None:
    weight, importance = weights(kind), None
    if weighted:
        importance = torch.rand(512, generator=torch.Generator().manual_seed(4)) ** 6 * 100
    spread = None if importance is None else cut(importance.expand(scheme.rows_per_scale(64), -1), scheme)
    wanted = _try_all(cut(weight.float(), scheme), scheme, spread)
    for given in (weight, weight.float()):
        found = find_grid(given, scheme, "mse", importance)
        assert torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.zeros, wanted.zeros)


def test_nearly_all_groups_are_decided_by_the_table() -> None:
    scheme = SCHEMES[0]
    found = cheapest(cut(weights("heavy"), scheme), scheme, None, _SHRINK, _table_errors)
    assert found is not None
    largest, _, certain = found
    assert torch.equal(largest, cut(weights("heavy"), scheme).float().abs().amax(-1))
    assert certain.float().mean() > 0.98


def test_equal_errors_are_left_to_the_loop() -> None:
    scheme, weight = QuantScheme(4, group_size=32), torch.zeros(2, 32)
    weight[0, 0], weight[1] = 0, 1.0
    found = cheapest(cut(weight, scheme), scheme, None, _SHRINK, _table_errors)
    assert found is not None
    assert not found[2][0].any()
    assert torch.equal(find_grid(weight, scheme, "mse").scales, _try_all(cut(weight, scheme), scheme, None).scales)


def test_the_table_serves_bf16_numbers_alone() -> None:
    weight = weights("normal")
    bits = stored_bits(weight.float())
    assert bits is not None
    assert torch.equal(bits.view(torch.bfloat16), weight)
    assert stored_bits(weight.float() * (1 + 2**-12)) is None
    assert stored_bits(weight.half()) is None
    fine = weight.float() * (1 + 2**-12)
    assert cheapest(cut(fine, SCHEMES[0]), SCHEMES[0], None, _SHRINK, _table_errors) is None
