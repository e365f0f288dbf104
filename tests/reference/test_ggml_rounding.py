"""Our rounding onto every ggml type beside `ggml_quantize_chunk`: no tensor has a larger error, weighed or not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.ggml_blocks import pack_blocks, pack_q2_0
from qwen3_export.core.gguf_types import block_length
from qwen3_export.core.pack import pack_q4_0, pack_q8_0
from qwen3_export.core.scheme import scheme_of_type
from qwen3_export.core.source import open_source
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ggml import round_rows
from tests.reference.ggml import dequantize_row, quantize_rows

TYPES = [
    "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4",
]  # fmt: skip
by_type = pytest.mark.parametrize("name", TYPES)


def packed(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """Bytes of a GGUF file."""
    name = tensor.scheme.label
    for kind, pack in (("q8_0", pack_q8_0), ("q4_0", pack_q4_0), ("q2_0", pack_q2_0)):
        if tensor.scheme == scheme_of_type(kind):
            return pack(tensor.codes, tensor.scales)
    assert name
    return pack_blocks(tensor)


def weights() -> dict[str, NDArray]:
    """Trained matrices, heavy tails, and fewer rows than a tile."""
    checkpoint, random = open_source("reference-model"), np.random.default_rng(0)
    found = {name: checkpoint.read(f"model.layers.{name}.weight") for name in ("2.self_attn.q_proj", "3.mlp.down_proj")}
    found["gaussian"] = (random.standard_normal((40, 1024)) * 0.02).astype(ml_dtypes.bfloat16)
    found["heavy"] = (random.standard_t(3, (70, 512)) * 0.02).astype(np.float32)
    return found


def importance(inputs: int) -> NDArray[np.float32]:
    return np.exp(1.5 * np.random.default_rng(inputs).standard_normal(inputs)).astype(np.float32)


def error(found: NDArray, weight: NDArray, weighed: NDArray | None) -> float:
    missed = (found.astype(np.float64) - weight.astype(np.float64)) ** 2
    return float((missed * (1.0 if weighed is None else weighed)).sum())


@by_type
@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "weighed"])
def test_no_error_is_larger_than_llama_cpps(name: str, with_importance: bool) -> None:
    for label, weight in weights().items():
        weighed = importance(weight.shape[1]) if with_importance else None
        tensor = round_rows("a", weight, scheme_of_type(name), weighed).tensor
        theirs = quantize_rows(weight.astype(np.float32), name, weighed)
        expanded = np.stack([dequantize_row(row, name, weight.shape[1]) for row in theirs])
        ours = error(dequantize(tensor), weight, weighed)
        assert ours <= error(expanded, weight, weighed), (label, ours)


def kinds(inputs: int) -> dict[str, NDArray]:
    """Matrices of 64 rows that trained ones are seldom like."""
    random = np.random.default_rng(inputs)
    gaussian = random.standard_normal((64, inputs)) * 0.02
    found = {
        "shifted": gaussian + 0.06,
        "positive": np.abs(gaussian),
        "sparse": gaussian * (random.random(gaussian.shape) < 0.1),
        "outlier columns": gaussian * np.where(np.arange(inputs) % 64 == 5, 30, 1),
        "uniform": random.uniform(-1, 1, gaussian.shape),
        "heavy": random.standard_t(2, gaussian.shape) * 0.02,
        "tiny": gaussian * 5e-5,
    }
    return {label: weight.astype(ml_dtypes.bfloat16) for label, weight in found.items()}


@by_type
@pytest.mark.parametrize("sigma", [0.5, 1.5, 3.0])
def test_no_error_is_larger_where_importance_is_uneven(name: str, sigma: float) -> None:
    inputs = max(4 * block_length(name), 128)
    for seed in range(3):
        weighed = np.exp(sigma * np.random.default_rng(seed).standard_normal(inputs)).astype(np.float32)
        for label, weight in kinds(inputs).items():
            found = dequantize(round_rows("a", weight, scheme_of_type(name), weighed).tensor)
            theirs = quantize_rows(weight.astype(np.float32), name, weighed)
            expanded = np.stack([dequantize_row(row, name, inputs) for row in theirs])
            ours, other = error(found, weight, weighed), error(expanded, weight, weighed)
            assert ours <= other * (1 + 1e-9), (label, seed, ours / other)


def few(inputs: int, share: float, rest: float) -> NDArray[np.float32]:
    """Importances of which a share matters, and all others are `rest`."""
    random = np.random.default_rng(inputs)
    found = np.where(random.random(inputs) < share, np.exp(1.5 * random.standard_normal(inputs)), rest)
    return found.astype(np.float32)


@by_type
@pytest.mark.parametrize(("share", "rest"), [(0.01, 0.0), (0.05, 0.0), (0.01, 1e-3)])
def test_no_error_is_larger_where_few_inputs_matter(name: str, share: float, rest: float) -> None:
    gaussian, weighed = np.random.default_rng(1).standard_normal((64, 1024)) * 0.02, few(1024, share, rest)
    for weight in (gaussian, np.abs(gaussian) + 0.1, -np.abs(gaussian) - 0.1):
        weight = weight.astype(np.float32)
        found = dequantize(round_rows("a", weight, scheme_of_type(name), weighed).tensor)
        theirs = quantize_rows(weight, name, weighed)
        expanded = np.stack([dequantize_row(row, name, 1024) for row in theirs])
        # An error as small as that of an fp16 scale is none.
        least = 2e-7 * error(np.zeros_like(weight), weight, weighed)
        assert error(found, weight, weighed) <= error(expanded, weight, weighed) + least


@by_type
def test_libggml_reads_what_was_meant(name: str) -> None:
    for weight in weights().values():
        tensor = round_rows("a", weight, scheme_of_type(name)).tensor
        expanded = np.stack([dequantize_row(row, name, weight.shape[1]) for row in packed(tensor)])
        np.testing.assert_array_equal(expanded, dequantize(tensor))


def test_q8_0_is_ggmls_own() -> None:
    for weight in weights().values():
        tensor = round_rows("a", weight, scheme_of_type("q8_0")).tensor
        np.testing.assert_array_equal(packed(tensor), quantize_rows(weight.astype(np.float32), "q8_0"))


@by_type
def test_sums_tell_the_error(name: str) -> None:
    weight = weights()["heavy"]
    found = round_rows("a", weight, scheme_of_type(name))
    missed = dequantize(found.tensor).astype(np.float64) - weight
    assert found.missed == pytest.approx((missed**2).sum(), rel=1e-4)
    assert found.whole == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-4)
    assert found.furthest == pytest.approx(np.abs(missed).max(), rel=1e-4)
    assert found.largest == np.abs(weight).max()


@by_type
def test_rows_are_rounded_on_their_own(name: str) -> None:
    weight, scheme = weights()["heavy"], scheme_of_type(name)
    whole, part = round_rows("a", weight, scheme).tensor, round_rows("a", weight[33:], scheme).tensor
    np.testing.assert_array_equal(packed(part), packed(whole)[33:])


@by_type
def test_every_float_type_is_read(name: str) -> None:
    weight, scheme = weights()["gaussian"], scheme_of_type(name)
    wanted = packed(round_rows("a", weight, scheme).tensor)
    np.testing.assert_array_equal(packed(round_rows("a", weight.astype(np.float32), scheme).tensor), wanted)
    half = weight.astype(np.float16)
    again = packed(round_rows("a", half.astype(np.float32), scheme).tensor)
    np.testing.assert_array_equal(packed(round_rows("a", half, scheme).tensor), again)


@by_type
def test_rows_that_leave_nothing_to_choose(name: str) -> None:
    scheme = scheme_of_type(name)
    rows = np.zeros((5, 256), np.float32)
    rows[1], rows[2], rows[3, 7], rows[4] = 0.5, -0.25, 3.0, 1e-30
    found = round_rows("a", rows, scheme).tensor
    weight = dequantize(found)
    assert np.isfinite(weight).all()
    assert (weight[0] == 0).all()
    np.testing.assert_allclose(weight[1:3], rows[1:3], rtol=0.07)
    assert weight[3, 7] == pytest.approx(3.0, rel=0.07)
    assert np.abs(weight[4]).max() < 1e-6
    nothing = np.zeros(256, np.float32)
    np.testing.assert_array_equal(packed(round_rows("a", rows, scheme, nothing).tensor), packed(found))


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq4_xs"])
def test_an_input_without_importance_still_counts_a_little(name: str) -> None:
    weight = weights()["gaussian"].astype(np.float32)
    weighed = np.ones(1024, np.float32)
    weighed[::2] = 0
    found = dequantize(round_rows("a", weight, scheme_of_type(name), weighed).tensor)
    plain = dequantize(round_rows("a", weight, scheme_of_type(name)).tensor)
    assert error(found[:, 1::2], weight[:, 1::2], None) < error(plain[:, 1::2], weight[:, 1::2], None)
    assert error(found[:, ::2], weight[:, ::2], None) < 4 * error(plain[:, ::2], weight[:, ::2], None)
