"""Quantizing on a GPU against quantizing on the CPU: the same layers, errors as small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_quantizing_on_the_gpu_is_as_good_as_on_the_cpu(tmp_path: Path) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        settings = QuantizeSettings(samples=16, sequence_length=128, device=device)
        recipe = load_recipe("gptq-max-w4a16-g128")
        results[device] = quantize(open_source("reference-model"), recipe, tmp_path / device, settings)["layers"]
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        assert (cpu["name"], cpu["tokens"]) == (cuda["name"], cuda["tokens"])
        assert cuda["error"] == pytest.approx(cpu["error"], rel=0.1)
