"""The accuracy level of ONNX Runtime's products: which one is written, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from numpy.typing import NDArray

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError
from qwen3_export.prove.rounding import level_cost
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.ort_folders import QUANTIZED
from tests.artifact.support import SAME, OnnxFolder, OnnxWeights, largest_difference, logits, mean_kl, round_to_nearest


@pytest.mark.parametrize("name", QUANTIZED)
def test_level_4_rounds_activations_and_stays_close(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray], name: str
) -> None:
    fast = logits(onnx_folder(name, accuracy_level=4).path, rows)
    assert largest_difference(fast, torch_logits(name)) > SAME
    assert mean_kl(torch_logits(name), fast) < 1e-3


@pytest.mark.parametrize("name", ["gptq-w4a16-g128", "rtn-w8a16"])
def test_default_level_is_the_fast_one_and_exact_undoes_it(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray], name: str
) -> None:
    folder = onnx_folder(name).path
    weights = OnnxWeights(folder)
    nodes = [node for node in weights.model.graph.node if node.op_type == "MatMulNBits"]
    assert {weights.attributes(node.name)["accuracy_level"] for node in nodes} == {4}
    assert largest_difference(logits(folder, rows, exact=True), torch_logits(name)) < SAME


def test_what_the_level_costs_is_measured_and_written_down(
    onnx_folder: OnnxFolder, rows: list[NDArray], tmp_path: Path
) -> None:
    checkpoint = onnx_folder("gptq-w4a16-g128").source
    result = export_onnx(checkpoint, tmp_path / "onnx", measure=level_cost)
    manifest = json.loads((tmp_path / "onnx" / "qwen3-export.json").read_text())
    assert result["accuracy_level"] == manifest["accuracy_level"] == 4
    assert result["added_kl"] == manifest["added_kl"]
    again = mean_kl(logits(tmp_path / "onnx", rows, exact=True), logits(tmp_path / "onnx", rows))
    assert again / 4 < result["added_kl"] < again * 4, "other text, the same order"
    exact = export_onnx(checkpoint, tmp_path / "exact", accuracy_level=0, measure=level_cost)
    assert exact["accuracy_level"] == 0
    assert "added_kl" not in exact


def test_levels_that_say_nothing_else_are_refused(onnx_folder: OnnxFolder, tmp_path: Path) -> None:
    """1 to 3 are other types of exact activations, which a CPU has no kernels for."""
    with pytest.raises(InputError, match=r"--accuracy-level 3: 0 .* or 4 .* expected"):
        export_onnx(onnx_folder("gptq-w4a16-g128").source, tmp_path / "onnx", accuracy_level=3)


def test_where_every_input_is_rounded_no_level_is_stated(onnx_folder: OnnxFolder, tmp_path: Path) -> None:
    result = export_onnx(onnx_folder("int8-dynamic").source, tmp_path / "onnx", measure=level_cost)
    assert result["accuracy_level"] is None
    assert "added_kl" not in result


def test_a_cost_that_cannot_be_measured_says_why(make_checkpoint: Callable, tmp_path: Path) -> None:
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", ("*", QuantScheme(4, group_size=32)))
    result = export_onnx(checkpoint, tmp_path / "onnx", measure=level_cost)
    assert result["added_kl"] is None
    assert "tokenizer" in result["added_kl_reason"]
