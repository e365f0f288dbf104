"""`edge-mixed-4.5bpw`: near its size on every Qwen3, and exact in ONNX Runtime and GGUF."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.ship.gguf import supports as gguf_supports
from qwen3_export.ship.onnx.ort_ops import supports as ort_supports
from tests.cli.conftest import SHORT
from tests.cli.helpers import call
from tests.conftest import tiny_config

# hidden, intermediate, heads; all have 8 key/value heads of 128.
SHAPES = {"0.6B": (1024, 3072, 16), "1.7B": (2048, 6144, 16), "4B": (2560, 9728, 32), "8B": (4096, 12288, 32)}


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_near_four_and_a_half_bits(name: str) -> None:
    hidden, intermediate, heads = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    linears = parse_config(tiny_config(**sizes, num_key_value_heads=8, head_dim=128), name).all_linears()
    recipe = load_recipe("edge-mixed-4.5bpw")
    recipe.check_against(linears)
    bits = 0.0
    for linear, shape in linears.items():
        scheme = recipe.scheme_for(linear)
        assert scheme is not None
        assert gguf_supports(scheme) is None
        assert ort_supports(scheme) is None
        bits += scheme.bits_per_weight(shape) * math.prod(shape)
    assert bits / sum(map(math.prod, linears.values())) == pytest.approx(4.5, abs=0.13)


def test_it_arrives_exactly(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    assert call("quantize", model, "--recipe", "edge-mixed-4.5bpw", "--output", folder, *SHORT).code == 0
    for command, output in (("onnx", "model-onnx"), ("gguf", "model.gguf")):
        assert call(command, folder, "--output", tmp_path / output, "--json").json["exact"] is True
