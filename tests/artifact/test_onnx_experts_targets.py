"""Mixtures of experts in ONNX for targets with a GPU: which operators they get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx.experts import LOOP, QMOE
from tests.artifact.expert_folders import IDS, WIDE, export, with_experts
from tests.artifact.support import logits
from tests.conftest import tiny_moe_config

# Per scheme: what the QMoE kernels of CUDA and of browsers do not take, as read in ONNX Runtime; None where they do.
GPU = {
    QuantScheme(4, group_size=32): (None, None),
    QuantScheme(8, group_size=32): (None, None),
    QuantScheme(4, group_size=64, symmetric=False): (None, "no zero points"),
    QuantScheme(4, group_size=16): ("groups of 32, 64, 128", None),
    QuantScheme(4, strategy="channel", symmetric=False): ("in groups alone", "no zero points"),
    QuantScheme(2, group_size=16): ("4 and 8 bits", "4 and 8 bits"),
}


@pytest.mark.parametrize("target", ["cuda", "web"])
@pytest.mark.parametrize("scheme", GPU, ids=lambda scheme: scheme.label)
def test_targets_with_a_gpu_get_the_operators_that_they_have(
    make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme, target: str
) -> None:
    """The graph runs on the CPU too, in fp16, and its logits are torch's but for close choices of the router."""
    checkpoint = with_experts(make_checkpoint(WIDE), scheme, tmp_path)
    [found] = export(checkpoint, tmp_path / "onnx", None, target=target)
    reason = GPU[scheme][target == "web"]
    assert found["operator"] == (QMOE if reason is None else LOOP)
    assert found["reason"] is None if reason is None else reason in found["reason"]
    [graph] = (tmp_path / "onnx").rglob("*.onnx")
    fused = [n for n in onnx.load(str(graph), load_external_data=False).graph.node if n.op_type == "QMoE"]
    newer = [
        {a.name: a.i for a in node.attribute if a.name in ("weights_prepacked", "accuracy_level")} for node in fused
    ]
    assert newer == [{"weights_prepacked": 0} if target == "cuda" else {}] * len(fused)
    off = np.concatenate(logits(tmp_path / "onnx", IDS)) - np.concatenate(logits(checkpoint.folder, IDS))
    assert np.median(np.abs(off)) < 0.02


def test_what_else_a_gpu_does_not_fuse(make_checkpoint: Callable, tmp_path: Path) -> None:
    scheme = QuantScheme(4, group_size=32)
    narrow = tiny_moe_config(hidden_size=96, moe_intermediate_size=64, num_experts=4)
    checkpoint = with_experts(make_checkpoint(narrow), scheme, tmp_path / "first")
    [found] = export(checkpoint, tmp_path / "narrow-onnx", None, target="cuda")
    assert (found["operator"], "divisible by 64, not 96 and 64" in found["reason"]) == (LOOP, True)
    other = with_experts(make_checkpoint({**WIDE, "norm_topk_prob": False}, name="other"), scheme, tmp_path / "second")
    [found] = export(other, tmp_path / "web", None, target="web")
    assert (found["operator"], "norm_topk_prob" in found["reason"]) == (LOOP, True)
    [found] = export(other, tmp_path / "fp32", None, target="cuda", precision="fp32")
    assert (found["operator"], "16-bit" in found["reason"]) == (LOOP, True)
