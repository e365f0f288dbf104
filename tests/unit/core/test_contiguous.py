"""Arrays in row-major order are numpy's, bit for bit, of any type and shape."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.contiguous import contiguous


@pytest.mark.parametrize("shape", [(1030, 777), (256, 512), (1, 300_000), (300_000, 1), (3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.float64])
def test_a_transposed_matrix(shape: tuple[int, int], dtype: type) -> None:
    matrix = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    moved = contiguous(matrix.T)
    assert moved.flags.c_contiguous
    assert moved.dtype == matrix.dtype
    np.testing.assert_array_equal(moved, matrix.T)


def test_others_are_copied_as_numpy_does_or_not_at_all() -> None:
    cube = np.arange(24_000_000, dtype=np.int8).reshape(20, 30, -1)
    np.testing.assert_array_equal(contiguous(cube[:, ::2]), np.ascontiguousarray(cube[:, ::2]))
    assert contiguous(cube) is cube
