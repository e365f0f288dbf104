"""Experts in FP8 and in INT8 W8A8 become the loop of plain operators, in both flavors, with the folder's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.expert_folders import IDS, export, with_experts
from tests.artifact.support import (
    SAME,
    largest_difference,
    load_graph,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
)
from tests.artifact.test_onnx_sources import foreign
from tests.conftest import tiny_moe_config

CONFIG = tiny_moe_config(hidden_size=256, moe_intermediate_size=128, num_experts=5)
EXACT = [
    QuantScheme(8, type="float", strategy="channel"),
    QuantScheme(8, type="float", strategy="block"),
    QuantScheme(8, type="float", strategy="tensor"),
    QuantScheme(8, type="float", group_size=32, scale_dtype="e8m0"),
]
ROUNDED = [
    QuantScheme(8, type="float", strategy="channel", activations="dynamic-token"),
    QuantScheme(8, type="float", strategy="block", activations="dynamic-group"),
    QuantScheme(8, strategy="channel", activations="dynamic-token"),
]


def plain(folder: Path) -> set[str]:
    graph = load_graph(folder).graph
    assert "Loop" in {node.op_type for node in graph.node}
    return {node.domain for node in graph.node}


@pytest.mark.parametrize("scheme", EXACT, ids=lambda scheme: scheme.label)
def test_weights_alone_are_exact(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    checkpoint = with_experts(make_checkpoint(CONFIG), scheme, tmp_path)
    truth = logits(checkpoint.folder, IDS)
    for flavor in ("ort", "standard"):
        (group,) = export(checkpoint, tmp_path / flavor, flavor)
        assert group["operator"] == "loop of ai.onnx operators"
        assert (plain(tmp_path / flavor) == {""}) == (flavor == "standard")
        assert largest_difference(logits(tmp_path / flavor, IDS), truth) < SAME
    onnx.checker.check_model(str(tmp_path / "standard" / "model.onnx"), full_check=True)


@pytest.mark.parametrize("scheme", ROUNDED, ids=lambda scheme: scheme.label)
def test_inputs_are_rounded_as_the_scheme_says(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    """A number halfway between two rounded ones may fall the other way, and does so in few short texts."""
    original = make_checkpoint(CONFIG)
    checkpoint = with_experts(original, scheme, tmp_path)
    short, long = [random_ids(2, seed=seed) for seed in range(40)], [random_ids(90, seed=seed) for seed in range(3)]
    truth, wanted, wanted_long = (
        logits(original, long),
        logits(checkpoint.folder, short),
        logits(checkpoint.folder, long),
    )
    for flavor in ("ort", "standard"):
        export(checkpoint, tmp_path / flavor, flavor)
        off = [abs(a - b).max() for a, b in zip(logits(tmp_path / flavor, short), wanted, strict=True)]
        assert np.median(off) < SAME
        kl, its_own = (mean_kl(truth, found) for found in (logits(tmp_path / flavor, long), wanted_long))
        assert abs(kl - its_own) < 0.05 * its_own


def test_codes_and_scales_are_the_folders(make_checkpoint: Callable, tmp_path: Path) -> None:
    scheme = QuantScheme(8, type="float", strategy="block", activations="dynamic-group")
    checkpoint = with_experts(make_checkpoint(CONFIG), scheme, tmp_path)
    export(checkpoint, tmp_path / "onnx", "standard")
    graph = onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for expert in range(5):
        tensor = checkpoint.linear(f"model.layers.1.mlp.experts.{expert}.down_proj")
        codes, scales = (weights[f"layer.1.experts.down_proj.{part}"][expert] for part in ("codes", "scales"))
        np.testing.assert_array_equal(codes, tensor.codes)
        np.testing.assert_array_equal(scales, np.repeat(tensor.scales32, 128, axis=0)[: len(scales)])


def test_an_official_fp8_release_is_exported_whole(make_checkpoint: Callable, tmp_path: Path) -> None:
    """All linears in FP8, blocks of 128, as Qwen publishes mixtures; `ort` names the target that holds it."""
    scheme = QuantScheme(8, type="float", strategy="block", activations="dynamic-group")
    original, ids = make_checkpoint(CONFIG), [random_ids(90, seed=seed) for seed in range(3)]
    checkpoint = foreign(original, tmp_path / "fp8", "fp8", scheme)
    with pytest.raises(UnsupportedError) as caught:
        export_onnx(checkpoint, tmp_path / "refused")
    assert "--target standard" in (caught.value.hint or "")
    export(checkpoint, tmp_path / "onnx", None, target="standard")
    truth, wanted, found = (logits(folder, ids) for folder in (original, checkpoint.folder, tmp_path / "onnx"))
    assert abs(mean_kl(truth, found) - mean_kl(truth, wanted)) < 0.05 * mean_kl(truth, wanted)


def test_groups_that_divide_no_row_are_refused(make_checkpoint: Callable, tmp_path: Path) -> None:
    config = tiny_moe_config(hidden_size=256, moe_intermediate_size=96, num_experts=4)
    scheme = QuantScheme(8, type="float", strategy="block")
    checkpoint = round_to_nearest(make_checkpoint(config), tmp_path / "quantized", ("*.experts.*", scheme))
    with pytest.raises(UnsupportedError, match=r"down_proj .* 96 inputs are no whole number of groups"):
        export_onnx(checkpoint, tmp_path / "onnx", "standard")
