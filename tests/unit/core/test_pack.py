"""Pack/unpack pairs: what goes in comes out, and the bytes are those of a plain loop over the layout."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwen3_export.core import pack

WHOLE_BITS = st.sampled_from([2, 4, 8])
BITS = st.sampled_from([2, 3, 4, 8])
SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=70)


@st.composite
def bits_and_codes(draw: st.DrawFn, sizes: st.SearchStrategy[int] = BITS) -> tuple[int, np.ndarray]:
    bits = draw(sizes)
    return bits, draw(arrays.arrays(np.uint8, draw(SHAPES), elements=st.integers(0, 2**bits - 1)))


@st.composite
def ggml_matrix(draw: st.DrawFn, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, 32 n]`, and two numbers per block of 32, any fp16 value that is no NaN."""
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    codes = draw(arrays.arrays(np.uint8, (rows, 32 * blocks), elements=st.integers(0, largest)))
    half = st.floats(width=16, allow_nan=False)
    first, second = (draw(arrays.arrays(np.float16, (rows, blocks), elements=half)) for _ in range(2))
    return codes, first, second


def words_of(codes: list[int], bits: int) -> list[int]:
    """The layout, spelled out: element i in bits [i * b, (i + 1) * b) of one long number, cut into words."""
    value, count = sum(code << (i * bits) for i, code in enumerate(codes)), -(-len(codes) * bits // 32)
    return list(struct.unpack(f"<{count}i", value.to_bytes(4 * count, "little")))


@given(bits_and_codes())
def test_int32_words_give_the_codes_back(sample: tuple[int, np.ndarray]) -> None:
    bits, codes = sample
    words = pack.pack_int32(codes, bits)
    assert words.dtype == np.dtype("<i4")
    assert words.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 32))
    np.testing.assert_array_equal(pack.unpack_int32(words, bits, codes.shape[-1]), codes)


@given(bits_and_codes())
def test_int32_words_are_those_of_a_plain_loop(sample: tuple[int, np.ndarray]) -> None:
    bits, codes = sample
    row = codes.reshape(-1, codes.shape[-1])[0].tolist()
    found = pack.pack_int32(codes, bits)
    assert found.reshape(-1, found.shape[-1])[0].tolist() == words_of(row, bits)


@given(bits_and_codes(WHOLE_BITS))
def test_bytes_give_the_codes_back_with_zero_padding(sample: tuple[int, np.ndarray]) -> None:
    bits, codes = sample
    packed = pack.pack_bytes(codes, bits)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    found = pack.unpack_bytes(packed, bits)
    np.testing.assert_array_equal(found[..., : codes.shape[-1]], codes)
    assert not found[..., codes.shape[-1] :].any()


@pytest.mark.parametrize(("bits", "codes", "byte"), [(2, [0, 1, 2, 3], 0b11100100), (4, [0x3, 0xA], 0xA3), (8, [7], 7)])
def test_bytes_hold_the_first_code_in_the_lowest_bits(bits: int, codes: list[int], byte: int) -> None:
    assert pack.pack_bytes(np.array(codes, np.uint8), bits).tolist() == [byte]


def test_packing_does_not_depend_on_memory_order() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (24, 40), np.uint8)
    transposed = np.asfortranarray(codes)
    np.testing.assert_array_equal(pack.pack_int32(transposed, 4), pack.pack_int32(codes, 4))
    words = np.asfortranarray(pack.pack_int32(codes, 4))
    np.testing.assert_array_equal(pack.unpack_int32(words, 4, 40), codes)


def test_packing_leaves_its_input_alone() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    before = codes.copy()
    pack.pack_int32(codes, 4), pack.pack_bytes(codes, 4), pack.pack_q8_0(np.tile(codes, 2), np.ones((1, 1), "f2"))
    np.testing.assert_array_equal(codes, before)


@given(ggml_matrix(15))
def test_q4_0_gives_codes_and_scales_back(sample: tuple[np.ndarray, ...]) -> None:
    codes, scales, _ = sample
    found, d = pack.unpack_q4_0(pack.pack_q4_0(codes, scales))
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(d.view(np.uint16), scales.view(np.uint16))


@given(ggml_matrix(15))
def test_q4_1_gives_codes_scales_and_minimums_back(sample: tuple[np.ndarray, ...]) -> None:
    codes, scales, minimums = sample
    found, d, m = pack.unpack_q4_1(pack.pack_q4_1(codes, scales, minimums))
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(d.view(np.uint16), scales.view(np.uint16))
    np.testing.assert_array_equal(m.view(np.uint16), minimums.view(np.uint16))


@given(ggml_matrix(255))
def test_q8_0_gives_codes_and_scales_back(sample: tuple[np.ndarray, ...]) -> None:
    codes, scales, _ = sample
    found, d = pack.unpack_q8_0(pack.pack_q8_0(codes, scales))
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(d.view(np.uint16), scales.view(np.uint16))


def test_q4_0_bytes_are_scale_then_nibbles_of_j_and_j_plus_16() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    codes[0, 16:] = 15 - codes[0, 16:]
    nibbles = bytes(j | ((15 - j) << 4) for j in range(16))
    assert pack.pack_q4_0(codes, np.array([[0.5]])).tobytes() == struct.pack("<e", 0.5) + nibbles


def test_q4_1_bytes_are_scale_minimum_nibbles() -> None:
    codes = np.full((1, 32), 7, np.uint8)
    wanted = struct.pack("<ee", 0.25, -1.5) + b"\x77" * 16
    assert pack.pack_q4_1(codes, np.array([[0.25]]), np.array([[-1.5]])).tobytes() == wanted


def test_q8_0_bytes_are_scale_then_signed_codes() -> None:
    codes = np.array([[0, 127, 128, 129, 255] + [128] * 27], np.uint8)
    wanted = struct.pack("<e32b", 2.0, -128, -1, 0, 1, 127, *[0] * 27)
    assert pack.pack_q8_0(codes, np.array([[2.0]])).tobytes() == wanted


def test_ggml_rows_lie_one_after_another() -> None:
    random = np.random.default_rng(1)
    codes, scales = random.integers(0, 16, (3, 64), np.uint8), np.ones((3, 2), np.float16)
    together = pack.pack_q4_0(codes, scales)
    assert together.shape == (3, 2 * 18)
    for row in range(3):
        np.testing.assert_array_equal(pack.pack_q4_0(codes[row : row + 1], scales[:1])[0], together[row])
