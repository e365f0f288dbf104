"""Products of integers: exact for these, and as near to the plain product as the rounding of inputs lets them be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor, dequantize
from qwen3_export.model.integer_linear import from_codes, from_weight
from tests.unit.processors import needs_avx2

pytestmark = needs_avx2


def quantized(scheme: QuantScheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    random, grid = np.random.default_rng(seed), scheme.grid(shape)
    scales = random.uniform(0.001, 0.1, grid) * (random.choice([-1, 1], grid) if scheme.signed_scales else 1)
    zeros = None if scheme.symmetric else random.integers(0, scheme.max_code + 1, grid).astype(np.uint8)
    codes = random.integers(0, scheme.max_code + 1, shape).astype(np.uint8)
    return QuantizedTensor("some", shape, scheme, codes, scales.astype(SCALE_TYPES[scheme.scale_dtype]), zeros)


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Some columns a hundred times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) * torch.exp(2 * torch.randn(width, generator=generator))


def steps(x: torch.Tensor, length: int, largest: int) -> NDArray[np.float64]:
    """What an integer stands for, at every input."""
    groups = np.abs(x.double().numpy()).reshape(len(x), x.shape[1] // length, length).max(-1) / largest
    return np.repeat(groups, length, 1)


@st.composite
def tensors(draw: st.DrawFn) -> QuantizedTensor:
    symmetric, length = draw(st.booleans()), draw(st.sampled_from([8, 32, 40, 128, 256, 384]))
    scheme = QuantScheme(
        num_bits=draw(st.sampled_from([2, 3, 4, 8])),
        symmetric=symmetric,
        strategy=draw(st.sampled_from(["group", "channel"])),
        group_size=length,
        signed_scales=symmetric and draw(st.booleans()),
    )
    shape = (draw(st.integers(1, 50)), length * draw(st.integers(1, 4)))
    return quantized(scheme, shape, draw(st.integers(0, 1000)))


@settings(deadline=None, max_examples=60)
@given(tensors(), st.integers(0, 9), st.integers(0, 1000))
def test_products_are_as_near_as_the_rounding_of_inputs_lets_them_be(
    tensor: QuantizedTensor, tokens: int, seed: int
) -> None:
    x, weight = inputs(tokens, tensor.shape[1], seed), dequantize(tensor).astype(np.float64)
    linear = from_codes(tensor)
    assert linear is not None
    found = linear.product(x[None])
    assert found.shape == (1, tokens, tensor.shape[0])
    wanted, sizes = x.double().numpy() @ weight.T, x.double().abs().numpy() @ np.abs(weight).T
    # Never longer than 128, so the bound of the longest that may be is one for all.
    length = next(size for size in range(128, 0, -8) if tensor.scheme.group_length(tensor.shape[1]) % size == 0)
    bound = 0.5 * steps(x, length, 32767) @ np.abs(weight).T + 3e-6 * sizes
    assert bool((np.abs(found[0].numpy() - wanted) <= bound * 1.001).all())


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_sums_of_integers_are_exact(num_bits: int, zeros: bool) -> None:
    """Inputs that are integers up to the largest are what they are rounded to, and codes are at their limits."""
    scheme = QuantScheme(num_bits=num_bits, symmetric=not zeros, group_size=128, scale_dtype="fp32")
    tensor, random = quantized(scheme, (20, 512)), np.random.default_rng(1)
    tensor.codes[:4] = 0
    tensor.codes[4:8] = scheme.max_code
    if tensor.zeros is not None:
        tensor.zeros[::2], tensor.zeros[1::2] = 0, scheme.max_code
    x = random.integers(-32767, 32768, (6, 512))
    x[0], x[1], x[:, ::128] = 32767, -32767, 32767
    linear = from_codes(tensor)
    assert linear is not None
    found = linear.product(torch.from_numpy(x.astype(np.float32))).numpy()
    shifts = np.repeat(np.full((20, 4), scheme.midpoint) if tensor.zeros is None else tensor.zeros, 128, 1)
    whole = np.einsum("tgi,ogi->tog", *((v.reshape(-1, 4, 128)) for v in (x, tensor.codes.astype(np.int64) - shifts)))
    wanted = np.zeros((6, 20), np.float32)
    for group in range(4):
        wanted += whole[:, :, group].astype(np.float32) * tensor.scales32[:, group]
    np.testing.assert_array_equal(found, wanted)


def test_every_token_is_by_itself() -> None:
    linear, x = from_codes(quantized(QuantScheme(group_size=32), (33, 96))), inputs(11, 96)
    assert linear is not None
    together = linear.product(x)
    assert torch.equal(together, torch.cat([linear.product(x[i : i + 1]) for i in range(11)]))
    assert not linear.product(torch.zeros(2, 96)).any()
    assert torch.equal(linear.product(x.reshape(1, 11, 96)), together[None])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_no_number_leaves_none_in_its_token(bad: float) -> None:
    x = inputs(6, 96)
    x[3, 40] = bad
    for linear in (from_codes(quantized(QuantScheme(group_size=32), (33, 96))), from_weight(torch.randn(33, 96))):
        assert linear is not None
        assert torch.isfinite(linear.product(x)).all(1).tolist() == [i != 3 for i in range(6)]
        assert not torch.isfinite(linear.product(x)[3]).any()


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(type="float", scale_dtype="e8m0", group_size=32),
        QuantScheme(num_bits=8, type="float", strategy="channel"),
        QuantScheme(group_size=12),
        QuantScheme(group_size=36),
        QuantScheme(num_bits=8, strategy="channel", activations="dynamic-token"),
    ],
    ids=lambda scheme: scheme.label,
)
def test_schemes_that_do_not_fit_are_left_to_fp32(scheme: QuantScheme) -> None:
    shape = (8, 288)
    codes, scales = np.zeros(shape, np.uint8), np.ones(scheme.grid(shape)).astype(SCALE_TYPES[scheme.scale_dtype])
    assert from_codes(QuantizedTensor("some", shape, scheme, codes, scales)) is None
    assert from_weight(torch.ones(8, 12)) is None


@pytest.mark.parametrize("width", [40, 96, 1024])
def test_rounded_weights_are_nearer_than_products_in_bf16(width: int) -> None:
    weight, x = inputs(70, width, 3).bfloat16().float(), inputs(30, width, 4)
    linear = from_weight(weight)
    assert linear is not None
    wanted = x.double() @ weight.double().T
    found, coarse = (value.double() - wanted for value in (linear.product(x), x.bfloat16() @ weight.bfloat16().T))
    assert float(found.norm()) < 1e-3 * float(wanted.norm())
    assert float(found.norm()) < 0.5 * float(coarse.norm())


def test_weights_and_inputs_at_their_limits_do_not_overflow() -> None:
    for sign in (1.0, -1.0):
        linear = from_weight(torch.full((5, 256), 0.5 * sign))
        assert linear is not None
        torch.testing.assert_close(
            linear.product(torch.full((3, 256), -7.0)), torch.full((3, 5), -7 * 0.5 * sign * 256)
        )
