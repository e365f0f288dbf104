"""Shared fixtures: the reference model, small random models, and artifacts made once per session."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.resources import resource
from qwen3_export.core.source import open_source
from qwen3_export.core.tensorfile import write_tensors
from tests.once import once

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Other tests run beside these: llama.cpp's threads sleep while they wait (`run.llamacpp.interface`).
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# What starts the tests may set COLUMNS, which commands started here would take for a terminal's width.
os.environ.pop("COLUMNS", None)
# In a shell's background Ctrl-C is ignored, which the commands started here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Property tests are the same in every run, and never fail because the machine is busy.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


# Folders of tests that `make test-fast` leaves out.
_SLOW = ("artifact", "cli", "hostile", "install", "reference", "serving", "web")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and have those that share something slow run in one process, since each process makes its own.

    These are the tests of an installation, and those of a file with fixtures that are made once for it.
    """
    tests = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(tests)
        folder = place.parts[0]
        if folder not in _SLOW:
            continue
        item.add_marker(pytest.mark.slow)
        if folder in ("install", "serving", "web"):
            item.add_marker(pytest.mark.xdist_group(folder))
        elif item.get_closest_marker("xdist_group") is None and _has_fixture_of_its_file(item):
            item.add_marker(pytest.mark.xdist_group(str(place.with_suffix(""))))


def _has_fixture_of_its_file(item: pytest.Item) -> bool:
    made = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(definitions[-1].scope == "module" for definitions in made)


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    return resource("calibration") / "reference-model"


@pytest.fixture(scope="session")
def reference_model() -> Checkpoint:
    return open_source("reference-model")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of a tiny model, whose head_dim differs from hidden / heads."""
    values: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return {**values, **changes}


def tiny_moe_config(**changes: Any) -> dict[str, Any]:
    moe = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }
    return tiny_config(**{**moe, **changes})


def random_tensors(config: Qwen3Config, seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Random weights by tensor name: norms near one, matrices scaled by their inputs."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            values = 1 + 0.2 * random.standard_normal(shape)
        else:
            values = random.standard_normal(shape) / np.sqrt(shape[1]) * 1.5
        tensors[name] = values.astype(np.float32).astype(dtype)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A single-file checkpoint folder; `tensors` None makes random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = random_tensors(parse_config(config, "test"))
    write_tensors(folder / "model.safetensors", tensors.items())
    return folder


def copy_tokenizer(source: Path, folder: Path) -> Path:
    """Give a folder the tokenizer of another one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`make_checkpoint(config=…, tensors=…, name=…)` → folder."""

    def make(config: dict[str, Any] | None = None, tensors: Any = None, name: str = "tiny") -> Path:
        return write_checkpoint(tmp_path / name, config or tiny_config(), tensors)

    return make


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Have calibration samples multiplied in fp32, whatever the processor offers."""
    with pytest.MonkeyPatch.context() as patch:
        for faster in ("has_bf16", "has_fast_int_matmul"):
            patch.setattr(f"qwen3_export.model.workers.{faster}", lambda: False)
        yield


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantized(recipe)` → the reference model quantized with few samples, once per run of the tests."""
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize

    def get(recipe: str) -> Path:
        name = Path(recipe).stem

        def make(base: Path) -> None:
            settings = QuantizeSettings(samples=32, sequence_length=256)
            quantize(open_source("reference-model"), load_recipe(recipe), base / name, settings)

        folder, _ = once(tmp_path_factory, name, make)
        return folder / name

    return get


def cli(*arguments: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-c", "from qwen3_export.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
