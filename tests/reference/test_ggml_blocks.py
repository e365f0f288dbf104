"""Every ggml block type against gguf-py's and libggml's own dequantization, bit for bit; the folder layout keeps it."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_py_dequantize

from qwen3_export.core import pack
from qwen3_export.core.ggml_blocks import pack_blocks, pack_q2_0, unpack_blocks, unpack_q2_0
from qwen3_export.core.kquant import BLOCK_TYPES
from qwen3_export.core.layouts import Stored, layout
from qwen3_export.core.scheme import scheme_of_type
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor, block_specs, dequantize, join_rows
from tests.reference.ggml import dequantize_row, quantize_rows

ROWS, INPUTS = 5, 768


def random_tensor(name: str, seed: int = 0) -> QuantizedTensor:
    """A block type's tensor with every field at random: all codes, scales and mins that the type can hold."""
    random, scheme, block = np.random.default_rng(seed), scheme_of_type(name), BLOCK_TYPES[name]
    fields = {}
    for key, (dtype, shape) in block_specs(scheme, (ROWS, INPUTS)).items():
        if dtype == np.float16:
            values = random.standard_normal(shape) * 10.0 ** random.integers(-6, 2, shape)
            values.flat[0] = 0
            fields[key] = values.astype(np.float16)
        else:
            low, high = block.scale_range if key == "scales" else (0, block.max_min)
            fields[key] = random.integers(low, high + 1, shape).astype(dtype)
    codes = random.integers(0, scheme.max_code + 1, (ROWS, INPUTS), np.uint8)
    return QuantizedTensor("a", codes.shape, scheme, codes, **fields)


by_type = pytest.mark.parametrize("name", BLOCK_TYPES)


@by_type
def test_weights_are_gguf_pys_and_libggmls(name: str) -> None:
    tensor = random_tensor(name)
    raw, wanted = pack_blocks(tensor), dequantize(tensor)
    assert raw.nbytes * 8 == tensor.scheme.bits_per_weight(tensor.shape) * ROWS * INPUTS
    kind = GGMLQuantizationType[name.upper()]
    np.testing.assert_array_equal(gguf_py_dequantize(raw, kind).view(np.uint32), wanted.view(np.uint32))
    found = np.stack([dequantize_row(row, name, INPUTS) for row in raw])
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@by_type
def test_bytes_and_fields_go_both_ways(name: str) -> None:
    tensor = random_tensor(name, 1)
    raw = pack_blocks(tensor)
    again = unpack_blocks(raw, "a", tensor.scheme)
    for key in ("codes", *block_specs(tensor.scheme, tensor.shape)):
        np.testing.assert_array_equal(getattr(again, key), getattr(tensor, key))
    np.testing.assert_array_equal(pack_blocks(again), raw)
    parts = join_rows([tensor.rows(slice(0, 2)), tensor.rows(slice(2, ROWS))])
    np.testing.assert_array_equal(pack_blocks(parts), raw)


@by_type
def test_the_folder_layout_keeps_every_field(name: str) -> None:
    tensor = random_tensor(name, 2)
    ggml = layout("ggml")
    arrays = ggml.pack(tensor)
    specs = ggml.specs("a", tensor.shape, tensor.scheme)
    assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == specs
    again = ggml.unpack(Stored(arrays, arrays.__getitem__), "a", tensor.shape, tensor.scheme)
    np.testing.assert_array_equal(pack_blocks(again), pack_blocks(tensor))


def test_mxfp4() -> None:
    scheme, random = scheme_of_type("mxfp4"), np.random.default_rng(3)
    codes = random.integers(0, 16, (ROWS, INPUTS), np.uint8)
    scales = random.integers(100, 150, (ROWS, INPUTS // 32), np.uint8)
    tensor = QuantizedTensor("a", codes.shape, scheme, codes, scales.view(SCALE_TYPES["e8m0"]))
    raw = pack_blocks(tensor)
    np.testing.assert_array_equal(gguf_py_dequantize(raw, GGMLQuantizationType.MXFP4), dequantize(tensor))
    np.testing.assert_array_equal(np.stack([dequantize_row(row, "mxfp4", INPUTS) for row in raw]), dequantize(tensor))
    np.testing.assert_array_equal(pack_blocks(unpack_blocks(raw, "a", scheme)), raw)


def test_symmetric_two_bits_are_q2_0() -> None:
    scheme, random = scheme_of_type("q2_0"), np.random.default_rng(4)
    codes = random.integers(0, 4, (ROWS, INPUTS), np.uint8)
    scales = random.standard_normal((ROWS, INPUTS // 64)).astype(np.float16)
    tensor = QuantizedTensor("a", codes.shape, scheme, codes, scales)
    raw = pack_q2_0(codes, scales)
    np.testing.assert_array_equal(np.stack([dequantize_row(row, "q2_0", INPUTS) for row in raw]), dequantize(tensor))
    again = unpack_q2_0(raw)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


def test_blocks_that_libggml_quantized_to_two_bits_are_read() -> None:
    """What `ggml_quantize_chunk` wrote, read by us and by libggml, and written again."""
    weight = np.random.default_rng(5).standard_normal((ROWS, INPUTS)).astype(np.float32)
    raw = quantize_rows(weight, "q2_0")
    codes, scales = unpack_q2_0(raw)
    # It scales the largest weight to 1 or −1, and never uses the type's fourth value, 2.
    assert set(codes.flat) == {1, 2, 3}
    tensor = QuantizedTensor("a", codes.shape, scheme_of_type("q2_0"), codes, scales)
    np.testing.assert_array_equal(np.stack([dequantize_row(row, "q2_0", INPUTS) for row in raw]), dequantize(tensor))
    np.testing.assert_array_equal(pack_q2_0(codes, scales), raw)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_words(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 96), np.uint8)
    words = pack.pack_int32(codes, bits)
    assert words.shape == (3, 3 * bits)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(3, -1)
    np.testing.assert_array_equal(np.packbits(stream, axis=-1, bitorder="little").view("<i4"), words)
    np.testing.assert_array_equal(pack.unpack_int32(words, bits, 96), codes)
