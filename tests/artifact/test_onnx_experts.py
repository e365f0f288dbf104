"""Mixtures of experts in ONNX: what QMoE and the loop of plain operators compute equals our torch forward pass on
the same codes; the codes in the file equal the solver's; and what neither can hold is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import UnsupportedError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.parted import PartedModel
from qwen3_export.run.session import RuntimeOptions, greedy
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.tensorrt import export_tensorrt
from tests.artifact.expert_folders import IDS, WIDE, export, with_experts
from tests.artifact.support import (
    SAME,
    THREADS,
    OnnxWeights,
    largest_difference,
    load_graph,
    logits,
    low_bits_first,
    mean_kl,
    random_ids,
    round_to_nearest,
    tiny_with_tokenizer,
)
from tests.conftest import tiny_config, tiny_moe_config

# Experts that QMoE computes exactly at level 0.
FUSED = [
    *(QuantScheme(4, group_size=size, symmetric=sym) for size in (16, 32, 64, 128, 256) for sym in (True, False)),
    QuantScheme(4, group_size=32, signed_scales=True),
    QuantScheme(4, strategy="channel"),
    QuantScheme(4, strategy="channel", symmetric=False),
    QuantScheme(8, strategy="channel"),
    QuantScheme(2, group_size=16),
]
# Experts beside which it rounds activations, or which it does not know.
LOOPED = [
    QuantScheme(8, group_size=32),
    QuantScheme(8, group_size=64, symmetric=False),
    QuantScheme(2, group_size=32, symmetric=False),
    QuantScheme(2, strategy="channel"),
    QuantScheme(4, group_size=8),
]


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in load_graph(folder).graph.node}


@pytest.mark.parametrize("scheme", [*FUSED, *LOOPED], ids=lambda scheme: scheme.label)
def test_both_flavors_are_exact_at_level_0(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    checkpoint = with_experts(make_checkpoint(WIDE), scheme, tmp_path)
    truth = logits(checkpoint.folder, IDS)
    (group,) = export(checkpoint, tmp_path / "ort", accuracy_level=0)
    assert group["layers"] == [0, 1]
    assert (group["operator"] == "QMoE") == (scheme in FUSED) == (group["reason"] is None)
    assert ("QMoE" in operators(tmp_path / "ort")) == (scheme in FUSED) == ("Loop" not in operators(tmp_path / "ort"))
    assert largest_difference(logits(tmp_path / "ort", IDS), truth) < SAME
    (group,) = export(checkpoint, tmp_path / "standard", "standard")
    assert "Loop" in operators(tmp_path / "standard")
    assert {node.domain for node in load_graph(tmp_path / "standard").graph.node} == {""}
    onnx.checker.check_model(str(tmp_path / "standard" / "model.onnx"), full_check=True)
    assert largest_difference(logits(tmp_path / "standard", IDS), truth) < SAME


ROUTING = {
    "top 8 of 16": {"num_experts": 16, "num_experts_per_tok": 8},
    "all of 3": {"num_experts": 3, "num_experts_per_tok": 3},
    "not normalised": {"norm_topk_prob": False},
    "one dense layer": {"mlp_only_layers": [0]},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", ROUTING.values(), ids=ROUTING.keys())
@pytest.mark.parametrize("scheme", [None, QuantScheme(4, group_size=16)], ids=["bf16", "w4"])
def test_routing_is_hugging_faces(
    make_checkpoint: Callable, tmp_path: Path, changes: dict, scheme: QuantScheme | None
) -> None:
    folder = make_checkpoint(tiny_moe_config(**changes))
    checkpoint = with_experts(folder, scheme, tmp_path) if scheme else open_checkpoint(folder)
    truth = logits(checkpoint.folder, IDS)
    for flavor in ("ort", "standard"):
        export(checkpoint, tmp_path / flavor, flavor, **({"accuracy_level": 0} if flavor == "ort" else {}))
        assert largest_difference(logits(tmp_path / flavor, IDS), truth) < SAME


@pytest.mark.parametrize("scheme", [QuantScheme(4, group_size=32), QuantScheme(4, group_size=64, symmetric=False)])
def test_the_onnx_has_the_folders_kl(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    """KL from the 16-bit original, of the folder in torch and of both flavors, to 1e-6 nats."""
    original, ids = make_checkpoint(WIDE), [random_ids(120, seed=seed) for seed in range(3)]
    checkpoint = round_to_nearest(original, tmp_path / "quantized", ("*", scheme))
    truth = logits(original, ids)
    wanted = mean_kl(truth, logits(checkpoint.folder, ids))
    assert wanted > 1e-3
    for flavor in ("ort", "standard"):
        export(checkpoint, tmp_path / flavor, flavor, accuracy_level=0)
        assert abs(mean_kl(truth, logits(tmp_path / flavor, ids)) - wanted) < 1e-6


def test_two_bits_are_fused_at_no_level_where_nothing_undoes_the_rounding(
    make_checkpoint: Callable, tmp_path: Path
) -> None:
    scheme = QuantScheme(2, group_size=32, symmetric=False)
    checkpoint = with_experts(make_checkpoint(WIDE), scheme, tmp_path)
    (group,) = export(checkpoint, tmp_path / "ort", accuracy_level=4)
    assert group["operator"] != "QMoE"
    assert largest_difference(logits(tmp_path / "ort", IDS, exact=True), logits(checkpoint.folder, IDS)) < SAME


@pytest.mark.parametrize("scheme", [s for s in LOOPED if s.num_bits == 8], ids=lambda scheme: scheme.label)
def test_experts_are_fused_where_activations_may_be_rounded_and_exact_undoes_it(
    make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = with_experts(make_checkpoint(WIDE), scheme, tmp_path)
    (group,) = export(checkpoint, tmp_path / "ort", accuracy_level=4)
    assert (group["operator"], group["reason"]) == ("QMoE", None)
    found, truth = logits(tmp_path / "ort", IDS), logits(checkpoint.folder, IDS)
    assert largest_difference(found, truth) > SAME
    assert mean_kl(truth, found) < 1e-3
    # As `validate --exact` runs it, and as the level's cost is measured: in parts, beside rounded streams.
    assert largest_difference(logits(tmp_path / "ort", IDS, exact=True), truth) < SAME
    monkeypatch.setattr("qwen3_export.run.graph_parts.PART_BYTES", 1)
    model = PartedModel(tmp_path / "ort")
    streams = model.stream([[ids] for ids in IDS]), model.stream([[ids] for ids in IDS], exact=True)
    pieces = list(model.logits(*streams))
    as_it_runs, exact = (
        [np.concatenate(parts, -1) for parts in zip(*of, strict=True)] for of in zip(*pieces, strict=True)
    )
    assert largest_difference(exact, truth) < SAME
    assert largest_difference(as_it_runs, found) < SAME
    assert "ORT_QMOE_CPU_QNBIT_GEMM" not in os.environ


def test_gate_and_down_of_different_bits_go_into_the_loop(make_checkpoint: Callable, tmp_path: Path) -> None:
    four, eight = QuantScheme(4, group_size=32), QuantScheme(8, group_size=64)
    rules = (("*.1.mlp.experts.*.down_proj", eight), ("*.experts.*", four))
    checkpoint = round_to_nearest(make_checkpoint(WIDE), tmp_path / "quantized", *rules)
    fused, looped = export(checkpoint, tmp_path / "ort", accuracy_level=0)
    assert (fused["layers"], looped["layers"]) == ([0], [1])
    assert "one scheme" in looped["reason"]
    assert largest_difference(logits(tmp_path / "ort", IDS), logits(checkpoint.folder, IDS)) < SAME


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("scheme", [None, QuantScheme(4, group_size=32)], ids=["bf16", "w4"])
def test_fp16(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme | None, flavor: str) -> None:
    folder = make_checkpoint(WIDE)
    checkpoint = with_experts(folder, scheme, tmp_path) if scheme else open_checkpoint(folder)
    export(checkpoint, tmp_path / "onnx", flavor, precision="fp16")
    # Close choices of the router may fall the other way in fp16.
    off = [abs(a - b).max(-1) for a, b in zip(logits(tmp_path / "onnx", IDS), logits(folder, IDS), strict=True)]
    if scheme is None:
        assert np.median(np.concatenate(off)) < 0.05
    exact = logits(checkpoint.folder, IDS)
    assert np.median(np.abs(np.concatenate(logits(tmp_path / "onnx", IDS)) - np.concatenate(exact))) < 0.02


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, group_size=32), QuantScheme(4, group_size=16, symmetric=False)], ids=lambda s: s.label
)
def test_fused_experts_hold_the_solvers_codes(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    """Gate and up by turns, low nibble first: read back by bit operations after ContribOperators.md."""
    checkpoint = with_experts(make_checkpoint(WIDE), scheme, tmp_path)
    export(checkpoint, tmp_path / "onnx", accuracy_level=0)
    weights = OnnxWeights(tmp_path / "onnx")
    config = checkpoint.config
    for layer in range(config.num_layers):
        name = f"layer.{layer}.experts"
        inputs = [*weights.inputs(name), *[None] * 6]
        attributes = weights.attributes(name)
        assert (attributes["expert_weight_bits"], attributes["block_size"]) == (4, scheme.group_size)
        assert (attributes["swiglu_fusion"], attributes["k"]) == (1, 2)
        # Older runtimes know neither.
        assert not attributes.keys() & {"weights_prepacked", "accuracy_level"}
        for expert in range(config.num_experts):
            parts = [checkpoint.linear(f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj") for p in ("gate", "up")]
            down = checkpoint.linear(f"model.layers.{layer}.mlp.experts.{expert}.down_proj")
            for offset, tensor, (codes, scales, zeros) in (
                (slice(0, None, 2), parts[0], (inputs[2], inputs[3], inputs[11])),
                (slice(1, None, 2), parts[1], (inputs[2], inputs[3], inputs[11])),
                (slice(None), down, (inputs[5], inputs[6], inputs[12])),
            ):
                assert isinstance(tensor, QuantizedTensor)
                assert codes is not None
                assert scales is not None
                unpacked = low_bits_first(codes[expert], 4, tensor.shape[1])[offset]
                np.testing.assert_array_equal(unpacked, tensor.codes)
                np.testing.assert_array_equal(scales[expert][offset], tensor.scales.astype(np.float32))
                assert (zeros is None) == scheme.symmetric
                if zeros is not None and tensor.zeros is not None:
                    unpacked = low_bits_first(zeros[expert], 4, tensor.zeros.shape[1])[offset]
                    np.testing.assert_array_equal(unpacked, tensor.zeros)


def test_every_code_is_stored_once(make_checkpoint: Callable, tmp_path: Path) -> None:
    """Sizes of both flavors: 4-bit codes, fp32 scales; nothing expanded."""
    checkpoint = with_experts(make_checkpoint(WIDE), QuantScheme(4, group_size=32), tmp_path)
    config = checkpoint.config
    weights = config.num_layers * config.num_experts * 3 * 256 * 256
    wanted = weights // 2 + weights // 32 * 4
    for flavor in ("ort", "standard"):
        export(checkpoint, tmp_path / flavor, flavor)
        tensors = load_graph(tmp_path / flavor).graph.initializer
        stored = sum(
            int(item.value)
            for tensor in tensors
            if ".experts." in tensor.name and "router" not in tensor.name
            for item in tensor.external_data
            if item.key == "length"
        )
        assert stored == wanted


def test_experts_of_different_schemes_are_refused(make_checkpoint: Callable, tmp_path: Path) -> None:
    rules = (
        ("*.0.mlp.experts.3.up_proj", QuantScheme(8, group_size=32)),
        ("*.experts.*", QuantScheme(4, group_size=32)),
    )
    checkpoint = round_to_nearest(make_checkpoint(WIDE), tmp_path / "quantized", *rules)
    for flavor in ("ort", "standard"):
        with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts\.3\.up_proj is w8-g32-sym") as caught:
            export_onnx(checkpoint, tmp_path / "out" / "onnx", flavor)
        assert "mlp.experts" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_three_bits_are_refused(make_checkpoint: Callable, tmp_path: Path, flavor: str) -> None:
    checkpoint = with_experts(make_checkpoint(WIDE), QuantScheme(3, group_size=32), tmp_path)
    with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_proj .* 3 bits"):
        export_onnx(checkpoint, tmp_path / "out" / "onnx", flavor)


def test_tensorrt_refuses_many_experts(make_checkpoint: Callable, tmp_path: Path) -> None:
    many = tiny_moe_config(num_experts=20)
    with pytest.raises(UnsupportedError, match=r"mixture of 20 experts .* no loop .* up to 16") as caught:
        export_tensorrt(open_checkpoint(make_checkpoint(many)), tmp_path / "out" / "trt")
    assert "gguf" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_dense_results_say_nothing_of_experts(make_checkpoint: Callable, tmp_path: Path) -> None:
    assert "expert_layers" not in export_onnx(open_checkpoint(make_checkpoint(tiny_config())), tmp_path / "onnx")


@pytest.mark.parametrize("scheme", [None, QuantScheme(4, group_size=16)], ids=["bf16", "w4"])
def test_onnxruntime_genai_runs_it(reference_folder: Path, tmp_path: Path, scheme: QuantScheme | None) -> None:
    folder = tiny_with_tokenizer(tmp_path / "source", reference_folder, tiny_moe_config())
    checkpoint = with_experts(folder, scheme, tmp_path) if scheme else open_checkpoint(folder)
    export(checkpoint, tmp_path / "onnx", accuracy_level=0)
    session, ids = open_session(tmp_path / "onnx", RuntimeOptions(threads=THREADS)), random_ids(20)
    wanted = greedy(session, ids, 12).tolist()
    session.close()
    model = genai.Model(str(tmp_path / "onnx"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + 12)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0)[len(ids) :].tolist()
    assert found == wanted[: len(found)]
    assert found
