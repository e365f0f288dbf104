"""`dequantize` against a plain loop over the definition, and what the constructor refuses."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor, dequantize

SCHEMES = [
    QuantScheme(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group, scale_dtype=dtype)
    for bits in (2, 4, 8)
    for symmetric in (True, False)
    for strategy, group in (("group", 8), ("group", 24), ("channel", None))
    for dtype in ("bf16", "fp16", "fp32")
]


def random_tensor(scheme: QuantScheme, shape: tuple[int, int] = (5, 24), **changes: Any) -> QuantizedTensor:
    random = np.random.default_rng(0)
    grid = (shape[0], scheme.num_groups(shape[1]))
    values: dict[str, Any] = {
        "codes": random.integers(0, scheme.max_code + 1, shape, np.uint8),
        "scales": random.standard_normal(grid).astype(np.float32).astype(SCALE_TYPES[scheme.scale_dtype]),
        "zeros": None if scheme.symmetric else random.integers(0, scheme.max_code + 1, grid, np.uint8),
    }
    return QuantizedTensor("linear", shape, scheme, **{**values, **changes})


def by_the_definition(tensor: QuantizedTensor) -> np.ndarray:
    """`(code - zero) * scale` in fp32, weight by weight."""
    out_features, in_features = tensor.shape
    weight = np.empty(tensor.shape, np.float32)
    for o in range(out_features):
        for i in range(in_features):
            group = i // tensor.scheme.group_length(in_features) if tensor.g_idx is None else tensor.g_idx[i]
            zero = 2 ** (tensor.scheme.num_bits - 1) if tensor.zeros is None else int(tensor.zeros[o, group])
            weight[o, i] = np.float32(int(tensor.codes[o, i]) - zero) * np.float32(tensor.scales[o, group])
    return weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.label}-{s.scale_dtype}")
def test_dequantize_is_the_definition_bit_for_bit(scheme: QuantScheme) -> None:
    tensor = random_tensor(scheme)
    found = dequantize(tensor)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, by_the_definition(tensor))


@pytest.mark.parametrize("symmetric", [True, False])
def test_g_idx_says_which_group_a_column_belongs_to(symmetric: bool) -> None:
    scheme = QuantScheme(group_size=8, symmetric=symmetric)
    g_idx = np.random.default_rng(1).permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    tensor = random_tensor(scheme, g_idx=g_idx)
    np.testing.assert_array_equal(dequantize(tensor), by_the_definition(tensor))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_ordered_g_idx_changes_nothing(symmetric: bool) -> None:
    scheme = QuantScheme(group_size=8, symmetric=symmetric)
    ordered = np.repeat(np.arange(3, dtype=np.int32), 8)
    plain = dequantize(random_tensor(scheme))
    np.testing.assert_array_equal(dequantize(random_tensor(scheme, g_idx=ordered)), plain)


def test_dequantize_leaves_the_tensor_alone() -> None:
    tensor = random_tensor(QuantScheme(group_size=8, symmetric=False))
    before = tensor.codes.copy(), tensor.scales.copy()
    dequantize(tensor)
    np.testing.assert_array_equal(tensor.codes, before[0])
    np.testing.assert_array_equal(tensor.scales, before[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((5, 23), np.uint8)}, "codes are"),
        ({"codes": np.zeros((5, 24), np.int8)}, "codes are"),
        ({"codes": np.full((5, 24), 16, np.uint8)}, "a code exceeds 15"),
        ({"scales": np.ones((5, 2), ml_dtypes.bfloat16)}, "scales are"),
        ({"scales": np.ones((5, 3), np.float32)}, "scales are"),
        ({"zeros": np.zeros((5, 3), np.uint8)}, "zeros must be given exactly when"),
    ],
)
def test_a_symmetric_tensor_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_tensor(QuantScheme(group_size=8), **changes)


@pytest.mark.parametrize("zeros", [None, np.zeros((5, 2), np.uint8), np.zeros((5, 3), np.int32)])
def test_an_asymmetric_tensor_refuses_missing_or_misshapen_zeros(zeros: Any) -> None:
    with pytest.raises(ValueError, match="zeros"):
        random_tensor(QuantScheme(group_size=8, symmetric=False), zeros=zeros)
