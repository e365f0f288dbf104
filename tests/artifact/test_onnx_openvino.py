"""Standard folders in OpenVINO, in an environment of its own: the logits are those of our torch forward pass."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.environments import environment
from tests.artifact.support import SAME, largest_difference, logits, mean_kl, random_ids, round_to_nearest
from tests.conftest import tiny_config, tiny_moe_config

VERSION = "2026.4.1"
# Prefills the rows in turn, the first one in two pieces through the cache, and saves their logits.
PROGRAM = """
import sys
import numpy as np
import openvino

names = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
model = openvino.Core().compile_model(sys.argv[1] + "/model.onnx", "CPU", names)
inputs = {item.get_any_name(): item.get_partial_shape() for item in model.inputs}
pasts = [name for name in inputs if name.startswith("past")]


def run(ids, past):
    begin = 0 if past is None else past[pasts[0]].shape[2]
    if past is None:
        shapes = {name: inputs[name] for name in pasts}
        past = {n: np.zeros((1, s[1].get_length(), 0, s[3].get_length()), np.float32) for n, s in shapes.items()}
    total = begin + len(ids)
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64), **past}
    found = model({**feeds, "position_ids": np.arange(begin, total)[None]})
    return found["logits"][0].copy(), {n: found[n.replace("past_key_values", "present")].copy() for n in pasts}


rows = np.load(sys.argv[2])
results = {}
for name in rows.files:
    ids = rows[name].astype(np.int64)
    cut = len(ids) // 2
    first, past = run(ids[:cut], None)
    results[name] = np.concatenate([first, run(ids[cut:], past)[0]])
np.savez(sys.argv[3], **results)
"""


@pytest.fixture(scope="session")
def python() -> Path:
    """Python of an environment with OpenVINO."""
    return environment(f"openvino-{VERSION}", f"openvino=={VERSION}") / "python"


def openvino_logits(python: Path, folder: Path, rows: list[NDArray], place: Path) -> list[NDArray]:
    np.savez(place / "rows.npz", **{str(i): row for i, row in enumerate(rows)})
    command = [str(python), "-c", PROGRAM, str(folder), str(place / "rows.npz"), str(place / "logits.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(place / "logits.npz") as found:
        return [found[str(i)] for i in range(len(rows))]


MODELS = {
    "bf16": (tiny_config(), None, 23),
    "bf16, opset 21": (tiny_config(), None, 21),
    "w4": (tiny_config(tie_word_embeddings=False), QuantScheme(4, group_size=32), 23),
    "w4 asymmetric, opset 21": (tiny_config(), QuantScheme(4, group_size=32, symmetric=False), 21),
    "w8 per channel": (tiny_config(), QuantScheme(8, strategy="channel"), 23),
    "experts": (tiny_moe_config(), None, 23),
    "w4 experts": (tiny_moe_config(), QuantScheme(4, group_size=16), 23),
    "w2 asymmetric experts": (tiny_moe_config(), QuantScheme(2, group_size=16, symmetric=False), 23),
}


@pytest.mark.parametrize(("config", "scheme", "opset"), MODELS.values(), ids=MODELS.keys())
def test_small_models(
    make_checkpoint: Callable, python: Path, tmp_path: Path, config: dict, scheme: QuantScheme | None, opset: int
) -> None:
    source, rows = make_checkpoint(config), [random_ids(40), random_ids(9, seed=1)]
    rule = "*.experts.*" if config["model_type"] == "qwen3_moe" else "*"
    checkpoint = round_to_nearest(source, tmp_path / "q", (rule, scheme)) if scheme else open_checkpoint(source)
    export_onnx(checkpoint, tmp_path / "onnx", "standard", opset=opset)
    found = openvino_logits(python, tmp_path / "onnx", rows, tmp_path)
    assert largest_difference(found, logits(checkpoint.folder, rows)) < SAME


@pytest.mark.parametrize("name", ["gptq-w4a16-g128", "int8-dynamic"])
def test_the_reference_model(
    onnx_folder: Callable, torch_logits: Callable, rows: list[NDArray], python: Path, tmp_path: Path, name: str
) -> None:
    found = openvino_logits(python, onnx_folder(name, flavor="standard").path, rows, tmp_path)
    if name == "int8-dynamic":
        # A value near the middle of two steps may fall to either side in another order of sums.
        assert mean_kl(torch_logits(name), found) < 5e-4
    else:
        assert largest_difference(found, torch_logits(name)) < SAME
