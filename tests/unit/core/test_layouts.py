"""Folder layouts: every quantized linear comes back as it went in, and the words are those of a plain loop."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_export.core.layouts import Stored, layout
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor, dequantize
from qwen3_export.errors import InputError, RecipeError

LAYOUTS = ["compressed-tensors", "gptq", "awq", "fp8"]
# AutoAWQ packs outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight into one word, the first into the lowest bits.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E4M3_NAN = (0x7F, 0xFF)


def random_tensor(scheme: QuantScheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    random, grid = np.random.default_rng(seed), scheme.grid(shape)
    codes = random.integers(0, scheme.max_code + 1, shape, np.uint8)
    if scheme.type == "float" and scheme.num_bits == 8:
        codes[np.isin(codes, E4M3_NAN)] = 0
    # Exact in bf16 and fp16 alike, as every scale that the grid search gives.
    scales = (random.integers(128, 256, grid) * 2.0**-13).astype(SCALE_TYPES[scheme.scale_dtype])
    if scheme.signed_scales:
        scales = scales * random.choice([-1, 1], grid).astype(scales.dtype)
    zeros = None if scheme.symmetric else random.integers(0, scheme.max_code + 1, grid, np.uint8)
    shared = 37.5 if scheme.scale_dtype == "e4m3" else None
    fixed = 0.03125 if scheme.has_input_scale else None
    return QuantizedTensor("block.linear", shape, scheme, codes, scales, zeros, global_scale=shared, input_scale=fixed)


@st.composite
def integer_schemes(draw: st.DrawFn, name: str) -> QuantScheme:
    symmetric = draw(st.booleans())
    return QuantScheme(
        num_bits=4 if name == "awq" else draw(st.sampled_from([2, 3, 4, 8])),
        symmetric=symmetric,
        strategy="group" if name == "awq" else draw(st.sampled_from(["group", "channel"])),
        group_size=draw(st.sampled_from([8, 16, 32])),
        scale_dtype=draw(st.sampled_from(["bf16", "fp16"])),
        signed_scales=symmetric and draw(st.booleans()),
    )


@st.composite
def eight_bit_schemes(draw: st.DrawFn, name: str) -> QuantScheme:
    """Whole bytes: FP8, and INT8 whose inputs are rounded."""
    kind = "float" if name == "fp8" else draw(st.sampled_from(["float", "int"]))
    block = name == "fp8" or (kind == "float" and draw(st.booleans()))
    activations = st.sampled_from(["dynamic-token", "static-tensor"] + ([None] if kind == "float" else []))
    return QuantScheme(
        num_bits=8,
        type=kind,
        strategy="block" if block else draw(st.sampled_from(["channel", "tensor"])),
        block_shape=(draw(st.integers(1, 40)), draw(st.integers(1, 40))) if block else None,
        scale_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        activations="dynamic-group" if block else draw(activations),
    )


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, QuantizedTensor]:
    name = draw(st.sampled_from(LAYOUTS))
    small = st.sampled_from([("e8m0", 32), ("e4m3", 16)])
    kinds = [eight_bit_schemes(name)] if name == "fp8" else [integer_schemes(name)]
    if name == "compressed-tensors":
        of = small.map(lambda s: QuantScheme(type="float", scale_dtype=s[0], group_size=s[1]))
        mxfp8 = QuantScheme(8, "float", scale_dtype="e8m0", group_size=32)
        nvfp4 = QuantScheme(4, "float", scale_dtype="e4m3", group_size=16, activations="dynamic-group")
        kinds += [eight_bit_schemes(name), of, st.just(mxfp8), st.just(nvfp4)]
    scheme = draw(st.one_of(kinds))
    # Three-bit codes fill whole words 32 at a time, where the layout knows no unfinished ones.
    step = 32 if name in ("gptq", "awq") else scheme.group_size or 8
    rows = draw(st.integers(1, 3)) * (32 if name in ("gptq", "awq") else draw(st.sampled_from([1, 7, 16])))
    shape = rows, draw(st.integers(1, 3)) * step
    return name, random_tensor(scheme, shape, draw(st.integers(0, 99)))


@given(tensors())
def test_every_layout_gives_the_tensor_back_as_announced(sample: tuple[str, QuantizedTensor]) -> None:
    name, tensor = sample
    module: ModuleType = layout(name)
    assert module.supports(tensor.scheme) is None
    arrays = module.pack(tensor)
    specs = module.specs(tensor.name, tensor.shape, tensor.scheme)
    assert list(arrays) == list(specs)
    assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == specs
    found = module.unpack(Stored(arrays, arrays.__getitem__), tensor.name, tensor.shape, tensor.scheme)
    np.testing.assert_array_equal(found.codes, tensor.codes)
    assert found.scales.dtype == tensor.scales.dtype
    assert found.scales.tobytes() == tensor.scales.tobytes()
    assert (found.zeros is None) == tensor.scheme.symmetric
    if tensor.zeros is not None:
        np.testing.assert_array_equal(found.zeros, tensor.zeros)
    assert (found.global_scale, found.input_scale) == (tensor.global_scale, tensor.input_scale)
    np.testing.assert_array_equal(dequantize(found), dequantize(tensor))


def words(values: np.ndarray, bits: int) -> int:
    return sum(int(value) << (i * bits) for i, value in enumerate(values))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_compressed_tensors_words_are_those_of_a_plain_loop(bits: int, symmetric: bool) -> None:
    tensor = random_tensor(QuantScheme(num_bits=bits, symmetric=symmetric, group_size=16), (16, 32))
    arrays, per_word = layout("compressed-tensors").pack(tensor), 32 // bits
    packed = arrays["block.linear.weight_packed"].view(np.uint32)
    for o, k in np.ndindex(packed.shape):
        assert packed[o, k] == words(tensor.codes[o, k * per_word : (k + 1) * per_word], bits)
    assert arrays["block.linear.weight_shape"].tolist() == [16, 32]
    if tensor.zeros is not None:
        zeros = arrays["block.linear.weight_zero_point"].view(np.uint32)
        for k, g in np.ndindex(zeros.shape):
            assert zeros[k, g] == words(tensor.zeros[k * per_word : (k + 1) * per_word, g], bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gptq_words_are_those_of_a_plain_loop(bits: int, symmetric: bool) -> None:
    tensor = random_tensor(QuantScheme(num_bits=bits, symmetric=symmetric, group_size=16), (16, 32))
    arrays, per_word = layout("gptq").pack(tensor), 32 // bits
    qweight = arrays["block.linear.qweight"].view(np.uint32)
    for k, o in np.ndindex(qweight.shape):
        assert qweight[k, o] == words(tensor.codes[o, k * per_word : (k + 1) * per_word], bits)
    # The v1 format stores zero - 1; a symmetric zero point is the middle of the codes.
    zeros = np.full((16, 2), tensor.scheme.midpoint - 1) if tensor.zeros is None else tensor.zeros
    qzeros = arrays["block.linear.qzeros"].view(np.uint32)
    for g, k in np.ndindex(qzeros.shape):
        assert qzeros[g, k] == words(zeros[k * per_word : (k + 1) * per_word, g], bits)
    np.testing.assert_array_equal(arrays["block.linear.scales"], tensor.scales.T.astype(np.float16))
    assert arrays["block.linear.g_idx"].tolist() == [0] * 16 + [1] * 16


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_awq_words_are_those_of_a_plain_loop(symmetric: bool) -> None:
    tensor = random_tensor(QuantScheme(symmetric=symmetric, group_size=16), (16, 32))
    arrays = layout("awq").pack(tensor)
    qweight = arrays["block.linear.qweight"].view(np.uint32)
    for i, k in np.ndindex(qweight.shape):
        assert qweight[i, k] == words([tensor.codes[8 * k + o, i] for o in AWQ_ORDER], 4)
    zeros = np.full((16, 2), 8) if tensor.zeros is None else tensor.zeros
    qzeros = arrays["block.linear.qzeros"].view(np.uint32)
    for g, k in np.ndindex(qzeros.shape):
        assert qzeros[g, k] == words([zeros[8 * k + o, g] for o in AWQ_ORDER], 4)


def test_an_unknown_layout_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="layout 'marlin': one of awq, compressed-tensors, fp8, ggml, gptq"):
        layout("marlin")


@pytest.mark.parametrize(
    ("name", "scheme", "reason"),
    [
        ("awq", QuantScheme(num_bits=8), "4-bit groups only"),
        ("awq", QuantScheme(strategy="channel"), "4-bit groups only"),
        ("awq", QuantScheme(scale_dtype="fp32"), "fp16"),
        ("gptq", QuantScheme(scale_dtype="fp32"), "fp16"),
    ],
)
def test_a_layout_says_what_it_cannot_hold(name: str, scheme: QuantScheme, reason: str) -> None:
    assert reason in layout(name).supports(scheme)


@pytest.mark.parametrize(("name", "shape"), [("awq", (12, 32)), ("gptq", (12, 32)), ("gptq", (16, 36))])
def test_a_shape_that_cannot_be_packed_is_named(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match=r"block\.linear"):
        layout(name).specs("block.linear", shape, QuantScheme(group_size=4))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_one_scheme_for_all_linears_where_the_format_has_only_one(name: str) -> None:
    scheme = QuantScheme(group_size=32)
    with pytest.raises(RecipeError, match="b is not quantized"):
        layout(name).config({"a": scheme}, ["a", "b"])
    with pytest.raises(RecipeError, match="there are 2"):
        layout(name).config({"a": scheme, "b": QuantScheme(group_size=64)}, ["a", "b"])
    assert layout(name).config({"a": scheme, "b": scheme}, ["a", "b"])["group_size"] == 32
