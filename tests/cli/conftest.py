"""Small models and their artifacts, made once per session through the command line itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.deep_runs import LAYERS, OPTIONS
from tests.cli.helpers import call, hashes, small_disk, write_text_model
from tests.once import once

SHORT = ("--samples", "8", "--sequence-length", "64")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with the reference model's tokenizer."""
    return write_text_model(tmp_path_factory.mktemp("models") / "text-model")


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `model`, with enough layers to stop a run between two of them."""
    return write_text_model(tmp_path_factory.mktemp("models") / "deep-model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def undisturbed(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of every file of a run of `deep_model` that nothing disturbed."""

    def run(base: Path) -> dict[str, str]:
        outcome = call("quantize", deep_model, *OPTIONS, "--output", base / "out", "--threads", "1")
        assert outcome.code == 0, outcome.err
        return hashes(base / "out")

    _, found = once(tmp_path_factory, "undisturbed", run)
    return dict(found)


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`model` quantized, exported to every format, and its reference file, by kind."""
    folder, names = once(tmp_path_factory, "made", lambda base: _make(model, base))
    return {kind: folder / name for kind, name in names.items()}


def _make(model: Path, folder: Path) -> dict[str, str]:
    """Write the artifacts of `made`; their names by kind."""
    names = {
        "quantized": "quantized",
        "onnx": "model-onnx",
        "gguf": "model.gguf",
        "tensorrt": "model-trt",
        "reference": "original.safetensors",
    }
    paths = {kind: folder / name for kind, name in names.items()}
    commands: list[tuple[Any, ...]] = [
        ("quantize", model, "--recipe", "gptq-w4a16-g32", "--output", paths["quantized"], *SHORT),
        ("onnx", paths["quantized"], "--output", paths["onnx"]),
        ("gguf", paths["quantized"], "--output", paths["gguf"]),
        ("tensorrt", paths["quantized"], "--output", paths["tensorrt"], "--sm", "8.9"),
        ("reference", model, "--output", paths["reference"], "--tokens", "512"),
    ]
    for command in commands:
        outcome = call(*command)
        assert outcome.code == 0, outcome.err
    return names


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`disk(size)` → a folder on a file system of that many bytes."""
    with ExitStack() as stack:

        def make(size: int, *options: str) -> Path:
            try:
                return stack.enter_context(small_disk(tmp_path / f"disk-{size}", size, *options))
            except PermissionError:
                pytest.skip("needs the right to mount a file system")

        yield make
