"""Mixtures of experts in GGUF files: their tensors, order and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import gguf_fields, gguf_tensors, round_to_nearest, tiny_with_tokenizer
from tests.conftest import tiny_moe_config


def test_experts_are_stacked(tmp_path: Path, reference_folder: Path) -> None:
    config = tiny_moe_config(moe_intermediate_size=64)
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, config)
    scheme = QuantScheme(4, group_size=32)
    for checkpoint, kind in (
        (open_checkpoint(folder), Type.BF16),
        (round_to_nearest(folder, tmp_path / "quantized", ("*", scheme)), Type.Q4_0),
    ):
        output = tmp_path / f"{kind.name}.gguf"
        assert export_gguf(checkpoint, output)["exact"]
        check_experts(gguf_tensors(output), checkpoint, kind)


def check_experts(tensors: dict[str, Any], checkpoint: Any, kind: Type) -> None:
    for layer in range(checkpoint.config.num_layers):
        for part in ("gate", "up", "down"):
            tensor = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert tensor.tensor_type == kind
            weights = gguf.quants.dequantize(tensor.data, kind)
            for expert, weight in enumerate(weights):
                wanted = checkpoint.linear(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj")
                array = dequantize(wanted) if isinstance(wanted, QuantizedTensor) else wanted.astype(np.float32)
                np.testing.assert_array_equal(weight, array)
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert router.tensor_type == Type.F32
        np.testing.assert_array_equal(router.data, checkpoint.read(f"model.layers.{layer}.mlp.gate.weight"))


# One block of the converter's file of such a model; experts come when the last of them was read.
EXPERT_BLOCK = [
    "attn_norm",
    "ffn_down_exps",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_gate_inp",
    "ffn_norm",
    "attn_k_norm",
    "attn_k",
    "attn_output",
    "attn_q_norm",
    "attn_q",
    "attn_v",
]


def test_order_of_expert_tensors(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    export_gguf(open_checkpoint(folder), tmp_path / "moe.gguf")
    blocks = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in EXPERT_BLOCK]
    wanted = ["output.weight", "token_embd.weight", *blocks, "output_norm.weight"]
    assert list(gguf_tensors(tmp_path / "moe.gguf")) == wanted


def test_expert_metadata(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    export_gguf(open_checkpoint(folder), tmp_path / "moe.gguf")
    found = gguf_fields(tmp_path / "moe.gguf")
    assert found["general.architecture"] == "qwen3moe"
    wanted = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 48, "feed_forward_length": 96}
    assert {key: found[f"qwen3moe.{key}"] for key in wanted} == wanted
