"""Artifacts of the reference model, written once per session, and expected logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.source import open_source
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import heldout_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.artifact import support
from tests.artifact.support import Exported
from tests.once import once

ORIGINAL = "original"


@pytest.fixture(scope="session")
def tokenizer(reference_folder: Path) -> ModelTokenizer:
    return ModelTokenizer(reference_folder)


@pytest.fixture(scope="session")
def rows(tokenizer: ModelTokenizer) -> list[NDArray[np.int32]]:
    """One held-out sample of each domain, up to 96 tokens."""
    found = heldout_samples(tokenizer, load_documents("heldout"), 96)
    first = dict(zip(reversed(found.domains), reversed(found.ids), strict=True))
    return list(first.values())


@pytest.fixture(scope="session")
def source(reference_folder: Path, quantized: Callable[[str], Path]) -> Callable[[str], Path]:
    """`source(recipe)`: the reference model's folder, quantized unless the recipe is `original`."""
    return lambda name: reference_folder if name == ORIGINAL else quantized(name)


@pytest.fixture(scope="session")
def torch_logits(source: Callable[[str], Path], rows: list[NDArray]) -> Callable[[str], list[NDArray]]:
    """`torch_logits(recipe)`: logits of our own forward pass on `rows`, from the same codes."""
    made: dict[str, list[NDArray]] = {}

    def get(name: str) -> list[NDArray]:
        if name not in made:
            made[name] = support.logits(source(name), rows)
        return made[name]

    return get


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> Callable[..., Exported]:
    """`onnx_folder(recipe, flavor=…, precision=…, accuracy_level=…)`, each written once."""

    def get(name: str, **options: Any) -> Exported:
        checkpoint = open_source(str(source(name)))
        called = "-".join(["onnx", Path(name).stem, *(f"{key}-{value}" for key, value in sorted(options.items()))])
        folder, result = once(
            tmp_path_factory, called, lambda base: export_onnx(checkpoint, base / "folder", **options)
        )
        return Exported(folder / "folder", result, checkpoint)

    return get


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> Callable[..., Exported]:
    """`gguf_file(recipe, type_name)`, each written once; None takes the codes' own type."""

    def get(name: str, type_name: str | None = None) -> Exported:
        checkpoint, called = open_source(str(source(name))), f"gguf-{Path(name).stem}-{type_name}"
        folder, result = once(
            tmp_path_factory, called, lambda base: export_gguf(checkpoint, base / "model.gguf", type_name)
        )
        return Exported(folder / "model.gguf", result, checkpoint)

    return get


@pytest.fixture(scope="session")
def expanded_gguf(tmp_path_factory: pytest.TempPathFactory, gguf_file: Callable[..., Exported]) -> Callable[..., Path]:
    """`expanded_gguf(recipe, type_name)`: that file with its tensors expanded to fp32."""
    base, made = tmp_path_factory.mktemp("expanded"), {}

    def get(name: str, type_name: str | None = None) -> Path:
        key = (name, type_name)
        if key not in made:
            made[key] = support.expand_to_f32(gguf_file(name, type_name).path, base / f"{len(made)}.gguf")
        return made[key]

    return get
