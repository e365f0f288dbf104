"""A plan's folder without a real plan, and the GPU and TensorRT that run it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3_export.core import cuda
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.run import plan_files
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.profiles import decode_shapes, prefill_shapes
from tests.conftest import tiny_config, write_checkpoint
from tests.unit.run.fake_cuda import FakeDriver
from tests.unit.run.fake_tensorrt import PROFILE, fake_module, plan_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("plan")
    checkpoint = open_checkpoint(write_checkpoint(base / "tiny", tiny_config()))
    export_tensorrt(checkpoint, base / "trt", capabilities=("8.9", "12.0"), profile=PROFILE, onnx_only=True)
    (base / "trt" / "model.plan").write_bytes(plan_bytes(b"vtrt", "1.7.1.116", ("8.9", "12.0")))
    described = json.loads((base / "trt" / "engine.json").read_text())
    (base / "trt" / "engine.json").write_text(json.dumps({**described, "version": "1.7.1.116"}))
    return base / "trt"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., Any]:
    """Puts a GPU and TensorRT into this machine; returns both."""

    def install(
        driver: FakeDriver | None = None, profiles: int = 2, version: str | None = None
    ) -> tuple[FakeDriver, Any]:
        driver = driver or FakeDriver()
        config = open_checkpoint(folder.parent / "tiny").config
        shapes = [make(config, PROFILE) for make in (prefill_shapes, decode_shapes)[:profiles]]
        module = fake_module(folder, driver, shapes, version)
        monkeypatch.setattr(cuda, "C", SimpleNamespace(**{**vars(ctypes), "CDLL": lambda name: driver}))
        monkeypatch.setattr(plan_files.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(plan_files.importlib, "import_module", lambda name: module)
        return driver, module

    return install
