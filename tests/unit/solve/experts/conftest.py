"""The source that the tests of starved experts quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import Recipe
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.unit.solve.experts.support import LENGTH, SAMPLES, make_source
from tests.unit.solve.support import write_calibration_text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    folder = make_source(tmp_path_factory.mktemp("experts") / "moe", reference_folder)
    write_calibration_text(folder.parent / "calibration.txt")
    return folder


@pytest.fixture(scope="module")
def settings(source: Path) -> QuantizeSettings:
    return QuantizeSettings(str(source.parent / "calibration.txt"), SAMPLES, LENGTH, threads=2)


@pytest.fixture(scope="module")
def run(
    source: Path, settings: QuantizeSettings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Checkpoint, dict[str, Any]]]:
    """`run(recipe, setting=…)` → the quantized folder, opened, and its manifest."""

    def quantized(chosen: Recipe, progress: Progress | None = None, **changes: Any) -> tuple[Checkpoint, Any]:
        output = tmp_path_factory.mktemp("out") / "out"
        quantize(open_checkpoint(source), chosen, output, replace(settings, **changes), progress)
        return open_checkpoint(output), read_manifest(output)

    return quantized
