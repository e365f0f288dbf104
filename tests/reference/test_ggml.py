"""Our ggml blocks against gguf-py's reference implementation, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from qwen3_export.core import pack

Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
SHAPES = [(1, 32), (5, 96), (64, 1024)]
by_shape = pytest.mark.parametrize("shape", SHAPES)


def random_codes(shape: tuple[int, int], largest: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, largest + 1, shape, np.uint8)


def random_halves(shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    """Normal, subnormal, negative and zero fp16 values, one per block of 32."""
    values = np.random.default_rng(seed).standard_normal((shape[0], shape[1] // 32))
    values *= 10.0 ** np.random.default_rng(seed + 1).integers(-7, 3, values.shape)
    values.flat[0] = 0
    return values.astype(np.float16)


def by_block(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).repeat(32, axis=1)


@by_shape
def test_q4_0_bytes_mean_what_our_codes_mean(shape: tuple[int, int]) -> None:
    codes, scales = random_codes(shape, 15), random_halves(shape)
    wanted = (codes.astype(np.float32) - 8) * by_block(scales)
    np.testing.assert_array_equal(dequantize(pack.pack_q4_0(codes, scales), Q4_0), wanted)


@by_shape
def test_q4_1_bytes_mean_what_our_codes_mean(shape: tuple[int, int]) -> None:
    codes, scales, minimums = random_codes(shape, 15), random_halves(shape), random_halves(shape, 5)
    wanted = codes.astype(np.float32) * by_block(scales) + by_block(minimums)
    np.testing.assert_array_equal(dequantize(pack.pack_q4_1(codes, scales, minimums), Q4_1), wanted)


@by_shape
def test_q8_0_bytes_mean_what_our_codes_mean(shape: tuple[int, int]) -> None:
    codes, scales = random_codes(shape, 255), random_halves(shape)
    wanted = (codes.astype(np.float32) - 128) * by_block(scales)
    np.testing.assert_array_equal(dequantize(pack.pack_q8_0(codes, scales), Q8_0), wanted)


@by_shape
@pytest.mark.parametrize(
    ("kind", "unpack", "repack"),
    [
        (Q4_0, pack.unpack_q4_0, pack.pack_q4_0),
        (Q4_1, pack.unpack_q4_1, pack.pack_q4_1),
        (Q8_0, pack.unpack_q8_0, pack.pack_q8_0),
    ],
    ids=["q4_0", "q4_1", "q8_0"],
)
def test_bytes_of_gguf_py_are_read_and_written_again(
    shape: tuple[int, int],
    kind: GGMLQuantizationType,
    unpack: Callable[..., tuple[np.ndarray, ...]],
    repack: Callable[..., np.ndarray],
) -> None:
    weights = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    raw = quantize(weights, kind)
    codes, scales, *minimums = unpack(raw)
    assert (codes.shape, scales.shape) == (shape, (shape[0], shape[1] // 32))
    np.testing.assert_array_equal(repack(codes, scales, *minimums), raw)
    zero = {Q4_0: 8, Q4_1: 0, Q8_0: 128}[kind]
    found = (codes.astype(np.float32) - zero) * by_block(scales) + (by_block(minimums[0]) if minimums else 0)
    np.testing.assert_array_equal(found, dequantize(raw, kind))
    assert np.abs(found - weights).max() < 0.5
