"""ONNX folders of flavor `standard`: the ONNX checker accepts them, numbers read back with the onnx library
equal the solver's, and the logits of ONNX Runtime, and of onnx's own reference evaluator (the specification
in Python), equal those of our torch forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import InputError
from qwen3_export.run.artifact import open_session
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.ort_folders import EVERY, QUANTIZED
from tests.artifact.support import (
    SAME,
    YARN,
    Exported,
    OnnxFolder,
    OnnxWeights,
    graph_name,
    largest_difference,
    load_graph,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
)
from tests.conftest import tiny_config


def check_codes(exported: Exported) -> None:
    """Codes, scales and zeros of every DequantizeLinear, as `[out, in]`."""
    weights = OnnxWeights(exported.path)
    for module in exported.linears:
        wanted = exported.source.linear(module)
        assert isinstance(wanted, QuantizedTensor)
        codes, scales, *zeros = weights.inputs(f"{graph_name(module)}.dequantized")
        signed = wanted.scheme.midpoint if wanted.scheme.symmetric else 0
        np.testing.assert_array_equal(codes.astype(np.int16).T + signed, wanted.codes, module)
        grid = (-1, len(wanted.scales))
        np.testing.assert_array_equal(scales.reshape(grid).T, wanted.scales.astype(np.float32), module)
        if wanted.zeros is None:
            assert zeros == []
        else:
            np.testing.assert_array_equal(zeros[0].astype(np.uint8).reshape(grid).T, wanted.zeros, module)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_and_scale_is_the_solvers(onnx_folder: OnnxFolder, name: str) -> None:
    check_codes(onnx_folder(name, flavor="standard"))


@pytest.mark.parametrize("name", EVERY)
def test_the_checker_accepts_it_and_all_operators_are_standard(onnx_folder: OnnxFolder, name: str) -> None:
    exported = onnx_folder(name, flavor="standard")
    onnx.checker.check_model(str(exported.path / "model.onnx"), full_check=True)
    model = load_graph(exported.path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 23)]
    counts, layers = Counter(node.op_type for node in model.graph.node), exported.source.config.num_layers
    assert counts["Attention"] == layers
    assert counts["DequantizeLinear"] == (0 if name == "original" else 7 * layers)


@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_torch_in_default_settings(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray], name: str
) -> None:
    folder = onnx_folder(name, flavor="standard").path
    assert largest_difference(logits(folder, rows), torch_logits(name)) < SAME


def test_at_level_4_it_is_fused_and_stays_close(
    onnx_folder: OnnxFolder, torch_logits: Callable, rows: list[NDArray]
) -> None:
    """ONNX Runtime fuses DequantizeLinear and MatMul into one that rounds activations to 8 bits."""
    exported, truth = (
        onnx_folder("gptq-w4a16-g128", flavor="standard", accuracy_level=4),
        torch_logits("gptq-w4a16-g128"),
    )
    assert exported.result["accuracy_level"] == 4
    fused = logits(exported.path, rows)
    assert largest_difference(fused, truth) > SAME
    assert mean_kl(truth, fused) < 1e-3
    assert largest_difference(logits(exported.path, rows, exact=True), truth) < SAME


SCHEMES = [
    QuantScheme(4, group_size=32),
    QuantScheme(4, group_size=32, symmetric=False),
    QuantScheme(4, strategy="channel"),
    QuantScheme(4, strategy="channel", symmetric=False),
    QuantScheme(8, group_size=32),
    QuantScheme(8, group_size=32, symmetric=False),
    QuantScheme(8, strategy="channel"),
    QuantScheme(8, strategy="channel", symmetric=False),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_other_schemes_in_two_runtimes(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", ("*", scheme))
    folder, ids = tmp_path / "onnx", random_ids(40)
    check_codes(Exported(folder, export_onnx(checkpoint, folder, "standard"), checkpoint))
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    wanted = logits(checkpoint.folder, [ids])
    assert largest_difference(logits(folder, [ids]), wanted) < SAME
    every = np.ones((1, len(ids)), np.int64)
    by_the_specification = reference_evaluator(folder, checkpoint, ids[None], every, every.cumsum(1) - 1)
    assert largest_difference(list(by_the_specification), wanted) < SAME


def test_left_padding_by_the_specification(make_checkpoint: Callable, tmp_path: Path) -> None:
    folder, ids = make_checkpoint(), random_ids(20)
    export_onnx(open_checkpoint(folder), tmp_path / "onnx", "standard")
    alone, mask = logits(folder, [ids, ids[:12]]), np.ones((2, 20), np.int64)
    mask[1, :8] = 0
    batch, positions = np.stack([ids, np.pad(ids[:12], (8, 0))]), np.maximum(mask.cumsum(1) - 1, 0)
    found = reference_evaluator(tmp_path / "onnx", open_checkpoint(folder), batch, mask, positions)
    assert np.isfinite(found).all()
    assert largest_difference([found[0], found[1, 8:]], alone) < SAME


def test_mask_of_a_padded_chunk_behind_a_cache(make_checkpoint: Callable, tmp_path: Path) -> None:
    """Slot i sees the earlier slots that hold a token, and itself: a row that allows nothing could become NaN."""
    export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "onnx", "standard")
    model = onnx.load(str(tmp_path / "onnx" / "model.onnx"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("mask.allowed_out", onnx.TensorProto.BOOL, None))
    mask = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]])
    past, total = 3, mask.shape[1]
    feeds = {
        "input_ids": np.zeros((2, total - past), np.int64),
        "attention_mask": mask,
        "position_ids": np.zeros((2, total - past), np.int64),
    }
    caches = [value.name for value in model.graph.input if value.name.startswith("past")]
    feeds |= dict.fromkeys(caches, np.zeros((2, 2, past, 32), np.float32))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (allowed,) = session.run(["mask.allowed_out"], feeds)
    slots, queries = np.arange(total), np.arange(past, total)[:, None]
    wanted = ((slots <= queries) & (mask[:, None] == 1)) | (slots == queries)
    np.testing.assert_array_equal(allowed[:, 0], wanted)


def reference_evaluator(
    folder: Path, checkpoint: Checkpoint, ids: NDArray, mask: NDArray, positions: NDArray
) -> NDArray[np.float32]:
    """Logits by onnx's own Python implementation of every operator."""
    config = checkpoint.config
    empty = np.zeros((len(ids), config.num_kv_heads, 0, config.head_dim), np.float32)
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask, "position_ids": positions}
    for layer in range(config.num_layers):
        feeds |= {f"past_key_values.{layer}.{kind}": empty for kind in ("key", "value")}
    return ReferenceEvaluator(str(folder / "model.onnx")).run(["logits"], feeds)[0]


ROUNDED_INPUTS = {
    "int8": QuantScheme(8, strategy="channel", activations="dynamic-token"),
    "fp8": QuantScheme(8, type="float", strategy="channel", activations="dynamic-token"),
    "fp8 blocks": QuantScheme(8, type="float", strategy="block", activations="dynamic-group"),
}


@pytest.mark.parametrize("kind", ROUNDED_INPUTS)
def test_inputs_are_rounded_as_the_folder_rounds_them(make_checkpoint: Callable, tmp_path: Path, kind: str) -> None:
    """One linear is quantized: behind a second one, an input that lands on the other side of a tie would show."""
    source = make_checkpoint(tiny_config(num_hidden_layers=1, hidden_size=128, intermediate_size=128))
    rules = (("*.down_proj", ROUNDED_INPUTS[kind]), ("*", None))
    checkpoint = round_to_nearest(source, tmp_path / "quantized", *rules)
    export_onnx(checkpoint, tmp_path / "onnx", flavor="standard")
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    ids = [random_ids(24)]
    truth, plain = logits(tmp_path / "quantized", ids), logits(source, ids)
    ours = logits(tmp_path / "onnx", ids, exact=True)
    assert largest_difference(ours, truth) < 0.02 * largest_difference(plain, truth) + SAME


OTHER_OPSETS = {
    "float": {},
    "w4": {"scheme": QuantScheme(4, group_size=32)},
    "w4, no shared heads": {"scheme": QuantScheme(4, group_size=32, symmetric=False), "num_key_value_heads": 4},
    "yarn": {"rope_scaling": YARN},
}


@pytest.mark.parametrize("opset", [21, 24])
@pytest.mark.parametrize("changes", OTHER_OPSETS.values(), ids=OTHER_OPSETS.keys())
def test_other_opsets(make_checkpoint: Callable, tmp_path: Path, changes: dict, opset: int) -> None:
    scheme = changes.get("scheme")
    source = make_checkpoint(tiny_config(**{key: value for key, value in changes.items() if key != "scheme"}))
    checkpoint = round_to_nearest(source, tmp_path / "q", ("*", scheme)) if scheme else open_checkpoint(source)
    folder, ids = tmp_path / "onnx", [random_ids(40), random_ids(1)]
    export_onnx(checkpoint, folder, "standard", opset=opset)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    model = load_graph(folder)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", opset)]
    newer = {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert newer.isdisjoint({node.op_type for node in model.graph.node}) == (opset == 21)
    assert largest_difference(logits(folder, ids), logits(checkpoint.folder, ids)) < SAME


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_opset_21_with_a_cache_and_padding(make_checkpoint: Callable, tmp_path: Path, precision: str) -> None:
    source, ids = make_checkpoint(), random_ids(40)
    for opset in (21, 23):
        export_onnx(open_checkpoint(source), tmp_path / str(opset), "standard", precision=precision, opset=opset)
    found = []
    for opset in (21, 23):
        session = open_session(tmp_path / str(opset))
        found.append([session.prefill(ids), *(session.decode(token)[None] for token in (5, 6, 7))])
        session.close()
    assert largest_difference(*found) < (SAME if precision == "fp32" else 0.05)


def test_an_opset_belongs_to_the_standard_flavor(make_checkpoint: Callable, tmp_path: Path) -> None:
    for options in ({"opset": 21}, {"opset": 19, "flavor": "standard"}):
        with pytest.raises(InputError, match=f"--opset {options['opset']}"):
            export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "onnx", **options)
