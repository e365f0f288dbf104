"""Exports to TensorRT that are refused: schemes, requests, and builders that fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError, UnsupportedError
from qwen3_export.ship import tensorrt
from qwen3_export.ship.tensorrt import cost, export_tensorrt, plan_file
from qwen3_export.ship.tensorrt.profiles import Profile, default_profile
from tests.artifact.plans import refused
from tests.artifact.support import round_to_nearest
from tests.conftest import tiny_config

UNFIT = [
    (QuantScheme(4, group_size=32, symmetric=False), "zero points"),
    (QuantScheme(4, group_size=32, signed_scales=True), "signed_scales"),
    (QuantScheme(2, group_size=32), "2-bit"),
    (QuantScheme(4, group_size=256), "256"),
]


@pytest.mark.parametrize(("scheme", "reason"), UNFIT, ids=lambda value: getattr(value, "label", None))
def test_schemes_that_do_not_fit(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme, reason: str) -> None:
    source = make_checkpoint(tiny_config(hidden_size=256, intermediate_size=256, head_dim=64))
    checkpoint = round_to_nearest(source, tmp_path / "quantized", ("*", scheme))
    refused(checkpoint, tmp_path, UnsupportedError, reason)


REQUESTS = [
    ({"capabilities": ("9.0",)}, InputError, r"--sm 9\.0"),
    ({"capabilities": ("8.9", "89")}, InputError, "--sm 89"),
    ({"capabilities": ()}, InputError, "--sm"),
    ({"engine": "openvino"}, InputError, "openvino"),
    ({"precision": "fp32"}, InputError, "fp32"),
    ({"capabilities": ("7.5", "8.9")}, UnsupportedError, r"7\.5"),
    ({"capabilities": ("8.7",), "engine": "trt"}, InputError, r"--sm 8\.7: --engine trt"),
    ({"capabilities": ("12.0",), "engine": "trt", "onnx_only": True}, InputError, r"--sm 12\.0: --engine trt"),
    ({"profile": Profile(16, 2049)}, InputError, "--max-context 2049: the model has 2048 positions"),
    ({"profile": Profile(2049, 4096)}, InputError, "--max-prompt 2049: the model has 2048 positions"),
]


@pytest.mark.parametrize(("options", "error", "match"), REQUESTS, ids=lambda value: value if type(value) is str else "")
def test_requests_that_cannot_be_met(
    quantized: Callable, tmp_path: Path, options: dict, error: type[ExportError], match: str
) -> None:
    refused(open_checkpoint(quantized("gptq-w4a16-g128")), tmp_path, error, match, **options)


def test_yarn_stretches_the_positions(make_checkpoint: Callable, tmp_path: Path) -> None:
    """With and without, a profile of exactly the model's positions is taken."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    for config, most in ((tiny_config(), 128), (tiny_config(rope_scaling=scaling), 512)):
        checkpoint = open_checkpoint(make_checkpoint(config))
        profile = default_profile(checkpoint.config, 64, most)
        tensorrt.check_request(checkpoint, "rtx", None, "fp16", profile, onnx_only=True)
        match = f"--max-context {most + 1}: the model has {most} positions"
        refused(checkpoint, tmp_path, InputError, match, profile=Profile(64, most + 1))


def test_bf16_needs_more_than_7_5(make_checkpoint: Callable, tmp_path: Path) -> None:
    options = {"capabilities": ("7.5",), "precision": "bf16"}
    refused(open_checkpoint(make_checkpoint()), tmp_path, UnsupportedError, r"7\.5", **options)


@pytest.mark.parametrize(("engine", "module"), [("trt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_engine_without_its_package(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, module: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    checkpoint = open_checkpoint(make_checkpoint())
    refused(checkpoint, tmp_path, MissingRuntimeError, module, engine=engine)
    with pytest.raises(MissingRuntimeError) as caught:
        export_tensorrt(checkpoint, tmp_path / "trt", engine=engine)
    assert "pip install" in caught.value.hint


def test_too_little_memory_is_refused_before_the_work(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "available_bytes", lambda: 300 << 20)
    refused(open_checkpoint(make_checkpoint()), tmp_path, ResourceError, r"GiB of memory, 0\.29 GiB are left")


BROKEN_BUILDERS = [
    (-9, "", "", ResourceError, "memory"),
    (-11, "", "Internal Error: CHECK failed\n", UnsupportedError, "CHECK failed"),
    (-6, "", "terminate called after throwing an instance of 'std::bad_alloc'\n", ResourceError, "bad_alloc"),
    (
        0,
        json.dumps({"error": "OutOfMemory (Requested …)", "kind": "memory"}),
        "",
        ResourceError,
        "builder: out of memory",
    ),
    (0, json.dumps({"error": "the disk is full", "kind": "resource"}), "", ResourceError, "disk is full"),
    (0, json.dumps({"error": "no kernel", "kind": "unsupported"}), "", UnsupportedError, "no kernel"),
]


@pytest.mark.parametrize(("code", "out", "err", "error", "match"), BROKEN_BUILDERS)
def test_builder_that_fails(
    make_checkpoint: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    out: str,
    err: str,
    error: type[ExportError],
    match: str,
) -> None:
    answer = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(plan_file.subprocess, "run", lambda *_, **__: answer)
    refused(open_checkpoint(make_checkpoint()), tmp_path, error, match)


def test_a_graph_that_tensorrt_refuses_is_one_error(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real builder, given zero points behind the back of our own check."""
    scheme = QuantScheme(4, group_size=32, symmetric=False)
    checkpoint = round_to_nearest(make_checkpoint(), tmp_path / "quantized", ("*", scheme))
    monkeypatch.setattr(tensorrt, "supports", lambda scheme: None)
    refused(checkpoint, tmp_path, UnsupportedError, "TensorRT")
