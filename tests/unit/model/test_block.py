"""An expert's products for any number of tokens, made in few shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.model.decoder import load_block
from tests.conftest import tiny_moe_config, write_checkpoint


@torch.no_grad()
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_experts_products_take_few_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: torch.dtype
) -> None:
    block = load_block(open_checkpoint(write_checkpoint(tmp_path / "model", tiny_moe_config())), 0).running(products)
    name, plain, shapes = "mlp.experts.3.gate_proj", F.linear, set()

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        return plain(x, weight)

    monkeypatch.setattr(F, "linear", spy)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(products)
    weight = block.weights[name]
    for count in range(301):
        found = block.linear(name, x[:count])
        assert found.shape == (count, len(weight))
        wanted = x[:count].double() @ weight.double().T
        bound = 1e-5 if products == torch.float32 else 2.0**-7
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    assert sorted(rows for rows, _ in shapes) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320]
