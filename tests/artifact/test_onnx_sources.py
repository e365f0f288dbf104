"""Whatever a checkpoint is stored as, its ONNX computes it: other tools' layouts, tied and untied, 16 and 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import tensorrt_rtx

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import MANIFEST
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import Recipe, Rule
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.artifact.support import (
    SAME,
    THREADS,
    OnnxWeights,
    largest_difference,
    logits,
    low_bits_first,
    random_ids,
)
from tests.conftest import random_tensors, tiny_config, tiny_moe_config

# The asymmetric GPTQ layout warns of who refuses it.
pytestmark = pytest.mark.filterwarnings("ignore:the gptq layout with zero points")
IDS = [random_ids(40), random_ids(1)]
# What the embedding and the head are stored as does not depend on the layout.
LAYOUTS = {
    "gptq": ("gptq", QuantScheme(4, group_size=32, scale_dtype="fp16")),
    "gptq of one scale per row": ("gptq", QuantScheme(4, strategy="channel", scale_dtype="fp16")),
    "zero points per row": ("gptq", QuantScheme(4, strategy="channel", symmetric=False, scale_dtype="fp16")),
    "8 bits, one scale per row": ("compressed-tensors", QuantScheme(8, strategy="channel")),
    "gptq, asymmetric": ("gptq", QuantScheme(4, group_size=32, symmetric=False, scale_dtype="fp16")),
    "gptq, 8 bits": ("gptq", QuantScheme(8, group_size=32, scale_dtype="fp16")),
    "awq": ("awq", QuantScheme(4, group_size=32, symmetric=False, scale_dtype="fp16")),
    "compressed-tensors": ("compressed-tensors", QuantScheme(4, group_size=32)),
    "compressed-tensors, asymmetric": ("compressed-tensors", QuantScheme(4, group_size=32, symmetric=False)),
    "compressed-tensors, int8": (
        "compressed-tensors",
        QuantScheme(8, strategy="channel", activations="dynamic-token"),
    ),
    "fp8 of one scale per channel": ("compressed-tensors", QuantScheme(8, type="float", strategy="channel")),
    "fp8 of the official releases": (
        "fp8",
        QuantScheme(8, type="float", strategy="block", activations="dynamic-group"),
    ),
}


def foreign(source: Path, output: Path, layout: str, scheme: QuantScheme) -> Checkpoint:
    """A folder as another tool leaves it: nothing in it names us."""
    recipe = Recipe("rounded", "rtn", (Rule("*", scheme),))
    quantize(open_checkpoint(source), recipe, output, QuantizeSettings(threads=THREADS, layout=layout))
    (output / MANIFEST).unlink()
    return open_checkpoint(output)


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("layout", "scheme"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_tools_folders(
    make_checkpoint: Callable, tmp_path: Path, layout: str, scheme: QuantScheme, tied: bool, flavor: str
) -> None:
    source = make_checkpoint(tiny_config(tie_word_embeddings=tied, hidden_size=128, intermediate_size=128))
    checkpoint = foreign(source, tmp_path / "foreign", layout, scheme)
    assert checkpoint.quantization
    if scheme.type == "float" and flavor == "ort":
        with pytest.raises(UnsupportedError, match="q_proj"):
            export_onnx(checkpoint, tmp_path / "onnx", flavor)
        return
    result = export_onnx(checkpoint, tmp_path / "onnx", flavor, accuracy_level=0)
    assert result["exact"]
    found, truth = logits(tmp_path / "onnx", IDS), logits(checkpoint.folder, IDS)
    # Inputs near the middle of two int8 steps may fall to either side.
    assert largest_difference(found, truth) < (0.5 if scheme.activations else SAME)
    if flavor == "standard":
        onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)


def test_one_scale_per_row_is_repeated_for_groups(make_checkpoint: Callable, tmp_path: Path) -> None:
    """224 inputs are seven groups of 32, 128 are one: the same codes, and the row's scale for each group."""
    source = make_checkpoint(tiny_config(hidden_size=48, intermediate_size=224))
    checkpoint = foreign(source, tmp_path / "foreign", "gptq", QuantScheme(4, strategy="channel", symmetric=False))
    export_onnx(checkpoint, tmp_path / "onnx", accuracy_level=0)
    assert largest_difference(logits(tmp_path / "onnx", IDS), logits(checkpoint.folder, IDS)) < SAME
    weights = OnnxWeights(tmp_path / "onnx")
    for name, length in (("self_attn.o_proj", 128), ("mlp.down_proj", 32)):
        tensor, node = checkpoint.linear(f"model.layers.1.{name}"), f"layer.1.{name}"
        assert isinstance(tensor, QuantizedTensor)
        _, codes, scales, zeros = weights.inputs(node)
        assert weights.attributes(node)["block_size"] == length
        groups = tensor.shape[1] // length
        np.testing.assert_array_equal(low_bits_first(codes, 4, tensor.shape[1]), tensor.codes)
        np.testing.assert_array_equal(scales, np.repeat(tensor.scales, groups, 1).astype(np.float32))
        np.testing.assert_array_equal(low_bits_first(zeros, 4, groups), np.repeat(tensor.zeros, groups, 1))


SIZES = {
    "rows of 24": ({"intermediate_size": 24}, r"down_proj .* multiple of 16, not of 24"),
    "heads of 20": ({"head_dim": 20}, r"heads of 20; .* multiple of 8"),
}


@pytest.mark.parametrize(("changes", "message"), SIZES.values(), ids=SIZES.keys())
def test_sizes_that_the_kernels_do_not_take_are_refused(
    make_checkpoint: Callable, tmp_path: Path, changes: dict, message: str
) -> None:
    scheme = QuantScheme(8, strategy="channel")
    checkpoint = foreign(make_checkpoint(tiny_config(**changes)), tmp_path / "foreign", "compressed-tensors", scheme)
    with pytest.raises(UnsupportedError, match=message) as caught:
        export_onnx(checkpoint, tmp_path / "onnx")
    assert "--target standard" in (caught.value.hint or "")
    export_onnx(checkpoint, tmp_path / "onnx", target="standard")
    assert largest_difference(logits(tmp_path / "onnx", IDS), logits(checkpoint.folder, IDS)) < SAME


def test_a_hint_names_the_target_that_holds_it(make_checkpoint: Callable, tmp_path: Path) -> None:
    checkpoint = foreign(make_checkpoint(), tmp_path / "two", "compressed-tensors", QuantScheme(2, group_size=32))
    with pytest.raises(UnsupportedError) as caught:
        export_onnx(checkpoint, tmp_path / "onnx", target="standard")
    assert caught.value.hint == "--target cpu holds it exactly"


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_other_tools_experts(make_checkpoint: Callable, tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(tiny_moe_config(hidden_size=128, moe_intermediate_size=64))
    scheme = QuantScheme(4, group_size=32, symmetric=False, scale_dtype="fp16")
    checkpoint = foreign(source, tmp_path / "foreign", layout, scheme)
    truth = logits(checkpoint.folder, IDS)
    for flavor in ("ort", "standard"):
        export_onnx(checkpoint, tmp_path / flavor, flavor, accuracy_level=0)
        assert largest_difference(logits(tmp_path / flavor, IDS), truth) < SAME


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=["F16", "F32", "BF16"])
@pytest.mark.parametrize("config", [tiny_config(tie_word_embeddings=False), tiny_moe_config()], ids=["dense", "moe"])
def test_unquantized_sources(make_checkpoint: Callable, tmp_path: Path, config: dict, dtype: type, flavor: str) -> None:
    folder = make_checkpoint(config, random_tensors(parse_config(config, "test"), dtype=dtype))
    assert export_onnx(open_checkpoint(folder), tmp_path / "onnx", flavor, accuracy_level=0)["exact"]
    assert largest_difference(logits(tmp_path / "onnx", IDS), logits(folder, IDS)) < SAME


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("scheme", [None, QuantScheme(4, group_size=32)], ids=["bf16", "w4"])
def test_tensorrt_rtx_parses_the_standard_flavor(
    make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme | None, opset: int
) -> None:
    source = make_checkpoint()
    checkpoint = foreign(source, tmp_path / "q", "gptq", scheme) if scheme else open_checkpoint(source)
    export_onnx(checkpoint, tmp_path / "onnx", "standard", opset=opset)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network()
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "onnx" / "model.onnx"))
    assert network.num_layers > 50
