"""Inputs rounded with one calibrated scale, int8 and FP8: in ONNX as the folder rounds them, in TensorRT as Q/DQ.

A value near the middle of two steps may fall to either side in another order of sums, and moves what comes behind it.
So positions that none has touched are compared one by one, and all of them by their KL from the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.recipe import Recipe, Rule
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.source import open_source
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.profiles import Profile
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.artifact.support import SAME, load_graph, logits, mean_kl

KINDS = {"int8": QuantScheme(8, strategy="channel", activations="static-tensor")}
KINDS["fp8"] = QuantScheme(8, type="float", strategy="channel", activations="static-tensor")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`made(kind)` → the reference model, rounded, with scales from a few samples."""
    base = tmp_path_factory.mktemp("static")

    def get(kind: str) -> Checkpoint:
        if not (base / kind).is_dir():
            recipe = Recipe(kind, "rtn", (Rule("*", KINDS[kind]),))
            settings = QuantizeSettings(samples=8, sequence_length=64)
            quantize(open_source("reference-model"), recipe, base / kind, settings)
        return open_source(str(base / kind))

    return get


def kl_is_the_folders(original: list[NDArray], folder: list[NDArray], found: list[NDArray]) -> None:
    wanted = mean_kl(original, folder)
    assert wanted > 2e-3
    assert mean_kl(original, found) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(("kind", "flavor"), [("int8", "ort"), ("int8", "standard"), ("fp8", "standard")])
def test_onnx_has_the_folders_logits(
    made: Callable, torch_logits: Callable, rows: list[NDArray], tmp_path: Path, kind: str, flavor: str
) -> None:
    checkpoint = made(kind)
    assert export_onnx(checkpoint, tmp_path / "onnx", flavor)["exact"]
    if flavor == "standard":
        onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    counts = Counter(node.op_type for node in load_graph(tmp_path / "onnx").graph.node)
    assert counts["MatMulInteger"] == (42 if kind == "int8" else 0)
    folder, found = logits(checkpoint.folder, rows), logits(tmp_path / "onnx", rows)
    off = np.concatenate([np.abs(a - b).max(-1) for a, b in zip(folder, found, strict=True)])
    assert np.quantile(off, 0.05) < SAME
    assert mean_kl(folder, found) < 0.4 * mean_kl(torch_logits("original"), folder)
    kl_is_the_folders(torch_logits("original"), folder, found)


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_has_a_pair_before_every_product(
    made: Callable, torch_logits: Callable, rows: list[NDArray], tmp_path: Path, kind: str
) -> None:
    checkpoint = made(kind)
    export_tensorrt(checkpoint, tmp_path / "trt", capabilities=("8.9",), profile=Profile(32, 64))
    counts = Counter(node.op_type for node in load_graph(tmp_path / "trt").graph.node)
    assert counts["QuantizeLinear"] == 42
    kl_is_the_folders(torch_logits("original"), logits(checkpoint.folder, rows), logits(tmp_path / "trt", rows))
