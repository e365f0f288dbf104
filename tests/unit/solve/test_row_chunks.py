"""The error that a Hessian weighs, of which half is multiplied, against the whole product in fp64."""

from __future__ import annotations

import pytest
import torch

from qwen3_export.solve.rounding.row_chunks import quadratic_form


@pytest.mark.parametrize("size", [1, 40, 256, 257, 700])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_energy_is_the_trace(size: int, products: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix, x = torch.randn(9, size, generator=generator), torch.randn(300, size, generator=generator)
    hessian = x.T @ x / 300
    wanted = float((matrix.double() @ hessian.double() @ matrix.double().T).trace())
    bound = 1e-5 if products == torch.float32 else 1e-2
    assert quadratic_form(matrix, hessian, products) == pytest.approx(wanted, rel=bound)


def test_without_inputs_it_is_the_sum_of_squares() -> None:
    assert quadratic_form(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), None) == 14.25
