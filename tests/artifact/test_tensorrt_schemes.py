"""Every scheme that TensorRT-RTX takes: the plan builds, its ONNX holds the solver's codes, nothing is expanded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.pack import pack_bytes
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import ExportError, UnsupportedError
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.capabilities import fitting
from qwen3_export.ship.tensorrt.profiles import Profile
from tests.artifact.plans import header, onnx_weight_bytes
from tests.artifact.support import (
    Exported,
    load_graph,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
    tiny_with_tokenizer,
)
from tests.conftest import tiny_config, write_checkpoint

FP8, FP4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
NVFP4_INPUTS = QuantScheme(**FP4, group_size=16, scale_dtype="e4m3", activations="dynamic-group")
SCHEMES = {
    "int4 channel": (QuantScheme(4, strategy="channel"), "8.0"),
    "int4 groups of 16": (QuantScheme(4, group_size=16), "8.0"),
    "int4 groups of 64": (QuantScheme(4, group_size=64), "8.0"),
    "int8 channel": (QuantScheme(8, strategy="channel"), "8.0"),
    "int8 channel, a scale per token": (QuantScheme(8, strategy="channel", activations="dynamic-token"), "8.0"),
    "fp8 tensor": (QuantScheme(**FP8, strategy="tensor"), "8.9"),
    "fp8 channel": (QuantScheme(**FP8, strategy="channel", activations="dynamic-token"), "8.9"),
    "fp8 blocks": (QuantScheme(**FP8, strategy="block", activations="dynamic-group"), "8.9"),
    "mxfp8": (QuantScheme(**FP8, group_size=32, scale_dtype="e8m0"), "8.9"),
    "mxfp4": (QuantScheme(**FP4, group_size=32, scale_dtype="e8m0"), "12.0"),
    "nvfp4": (QuantScheme(**FP4, group_size=16, scale_dtype="e4m3"), "12.0"),
    "nvfp4, inputs too": (NVFP4_INPUTS, "12.0"),
}
# What becomes of a code in the file: integers get their sign, floats are their own bits.
SIZE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


@pytest.fixture(scope="module", params=SCHEMES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_folder: Path
) -> tuple[Exported, str]:
    base = tmp_path_factory.mktemp("scheme")
    scheme, least = SCHEMES[request.param]
    config = tiny_config(**SIZE)
    if scheme.has_input_scale:
        source = tiny_with_tokenizer(base / "tiny", reference_folder, config)
    else:
        source = write_checkpoint(base / "tiny", config)
    checkpoint = round_to_nearest(source, base / "q", ("*", scheme))
    result = export_tensorrt(checkpoint, base / "trt", capabilities=(least,), profile=Profile(32, 64))
    return Exported(base / "trt", result, checkpoint), least


def test_the_plan_holds_the_codes_and_no_more(exported: tuple[Exported, str]) -> None:
    made, _ = exported
    ratio = header(made.path / "model.plan")["weights"] / onnx_weight_bytes(made.path)
    assert ratio == pytest.approx(1, abs=0.03)


def test_every_code_and_scale_is_the_solvers(exported: tuple[Exported, str]) -> None:
    made, _ = exported
    stored = {tensor.name: tensor for tensor in load_graph(made.path).graph.initializer}
    linears = [name for name in made.linears if isinstance(made.source.linear(name), QuantizedTensor)]
    assert len(linears) == 14
    for module in linears:
        wanted = made.source.linear(module)
        name = module.replace("model.layers.", "layer.")
        codes = wanted.codes.T ^ np.uint8(wanted.scheme.midpoint if wanted.scheme.type == "int" else 0)
        raw = numpy_helper.to_array(stored[f"{name}.codes"], str(made.path))
        if wanted.scheme.num_bits == 8:
            np.testing.assert_array_equal(raw.view(np.uint8), codes, module)
        else:
            _same_nibbles(made.path, stored[f"{name}.codes"], codes, module)
        found = numpy_helper.to_array(stored[f"{name}.scales"], str(made.path)).astype(np.float32)
        np.testing.assert_array_equal(_spread(found, wanted), _spread_of(wanted), module)


def _same_nibbles(folder: Path, tensor: onnx.TensorProto, codes: np.ndarray, module: str) -> None:
    """Two codes a byte, the low one first, as they lie in the file."""
    place = {item.key: item.value for item in tensor.external_data}
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        raw = np.frombuffer(file.read(int(place["length"])), np.uint8)
    np.testing.assert_array_equal(raw, pack_bytes(np.ascontiguousarray(codes).reshape(-1), 4), module)


def _spread(found: np.ndarray, wanted: QuantizedTensor) -> np.ndarray:
    """Scales of the file as `[groups, out]`."""
    return np.broadcast_to(found, (wanted.scheme.num_groups(wanted.shape[1]), wanted.shape[0]))


def _spread_of(wanted: QuantizedTensor) -> np.ndarray:
    scales = wanted.scales.astype(np.float32)
    tall = wanted.scheme.rows_per_scale(wanted.shape[0])
    return np.repeat(scales, tall, axis=0)[: wanted.shape[0]].T


def test_onnx_runtime_gives_the_folders_logits(exported: tuple[Exported, str]) -> None:
    """Of FP4 it has no kernels: those graphs are checked code by code above."""
    made, _ = exported
    (scheme,) = set(made.source.schemes.values())
    if (scheme.type, scheme.num_bits) == ("float", 4):
        with pytest.raises(ExportError):
            logits(made.path, [random_ids(40)])
        return
    ids = [random_ids(40, seed=seed) for seed in range(3)]
    ours, truth = logits(made.path, ids), logits(made.source.folder, ids)
    # Where inputs are rounded, 16 bits put some of them on the other side of a tie; the weights are random.
    assert mean_kl(truth, ours) < (1e-2 if scheme.activations else 1e-5)
    rounded = [node for node in load_graph(made.path).graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == (14 if scheme.activations else 0)


def test_what_is_not_exact_is_said(exported: tuple[Exported, str]) -> None:
    made, least = exported
    (scheme,) = set(made.source.schemes.values())
    described = json.loads((made.path / "engine.json").read_text())
    assert described["compute_capabilities"] == [least]
    changed = {item["name"] for item in made.result["inexact_tensors"]} & set(made.source.schemes)
    # The quotient by NVFP4's global scale is a number of 16 bits.
    assert bool(changed) == (scheme.scale_dtype == "e4m3")
    assert all(item["max_rel_error"] < 1.5e-3 for item in made.result["inexact_tensors"])


def test_a_capability_that_is_too_old_is_refused(exported: tuple[Exported, str], tmp_path: Path) -> None:
    made, least = exported
    older = {"8.0": "7.5", "8.9": "8.6", "12.0": "8.9"}[least]
    with pytest.raises(UnsupportedError, match=f"--sm {older}"):
        export_tensorrt(made.source, tmp_path / "trt", capabilities=(older, "12.0"))
    assert not (tmp_path / "trt").exists()
    assert fitting(made.source.schemes.values(), (older, least)) == (least,)


def test_static_inputs_are_rounded_in_the_graph(make_checkpoint: Callable, tmp_path: Path) -> None:
    from qwen3_export.core.recipe import load_recipe
    from qwen3_export.core.source import open_source
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize

    settings = QuantizeSettings(samples=4, sequence_length=64)
    quantize(open_source("reference-model"), load_recipe("fp8-static"), tmp_path / "q", settings)
    checkpoint: Checkpoint = open_source(str(tmp_path / "q"))
    export_tensorrt(checkpoint, tmp_path / "trt", capabilities=("8.9",), profile=Profile(32, 64))
    graph = load_graph(tmp_path / "trt").graph
    scales = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    found = {t.name: numpy_helper.to_array(t, str(tmp_path / "trt")) for t in graph.initializer if t.name in scales}
    wanted = {np.float16(checkpoint.linear(name).input_scale) for name in checkpoint.schemes}
    assert {np.float16(value) for value in found.values()} == wanted
    zero = next(t for t in graph.initializer if t.name == "zero.float8e4m3fn")
    assert numpy_helper.to_array(zero, str(tmp_path / "trt")).view(ml_dtypes.float8_e4m3fn) == 0
