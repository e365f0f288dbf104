"""A few experts in TensorRT: whatever their scheme, the plan builds and its ONNX gives the folder's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.profiles import Profile
from tests.artifact.support import load_graph, logits, mean_kl, random_ids, round_to_nearest, tiny_with_tokenizer
from tests.artifact.test_tensorrt_schemes import SCHEMES
from tests.conftest import tiny_moe_config

FP8, INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8}
INPUTS_TOO = {
    "fp8 static": (QuantScheme(**FP8, strategy="channel", activations="static-tensor"), "8.9"),
    "int8 static": (QuantScheme(**INT8, strategy="channel", activations="static-tensor"), "8.0"),
}
# FP4 has tests of its own: ONNX Runtime has no kernels for it.
CASES = {
    "bf16": (None, "8.0"),
    **{name: case for name, case in SCHEMES.items() if "fp4" not in name},
    **INPUTS_TOO,
}
CONFIG = tiny_moe_config(hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_experts=4)
IDS = [random_ids(40, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("name", CASES)
def test_tensorrt_computes_a_few_experts_all(name: str, tmp_path: Path, reference_folder: Path) -> None:
    """The plan builds, stores every matrix once, and its ONNX gives the logits of a choice."""
    scheme, least = CASES[name]
    source = tiny_with_tokenizer(tmp_path / "source", reference_folder, CONFIG)
    checkpoint = (
        round_to_nearest(source, tmp_path / "q", ("*.experts.*", scheme)) if scheme else open_checkpoint(source)
    )
    export_tensorrt(checkpoint, tmp_path / "trt", capabilities=(least,), profile=Profile(32, 64))
    assert {node.op_type for node in load_graph(tmp_path / "trt").graph.node}.isdisjoint({"Loop", "NonZero"})
    truth, found = logits(checkpoint.folder, IDS), logits(tmp_path / "trt", IDS)
    assert mean_kl(truth, found) < (1e-2 if scheme and scheme.activations else 1e-4)
    # Tokens are not mixed up: each is the likeliest match of its own.
    closest = np.argmin(((found[0][:, None] - truth[0][None]) ** 2).sum(-1), axis=1)
    assert (closest == np.arange(len(closest))).all()
