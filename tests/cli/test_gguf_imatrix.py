"""`gguf --imatrix` with the matrix of another model: which tensor says so, what it has, what was wanted, what to do."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.imatrix import Imatrix, ImatrixEntry, read_imatrix
from qwen3_export.core.qwen3 import parse_config
from tests.cli.helpers import call, names, refused, write_text_model
from tests.conftest import random_tensors, tiny_moe_config, write_checkpoint

SHORT = ("--samples", "2", "--sequence-length", "16")
# Types whose blocks divide every row here: no tensor gets another one.
FITS = ("--type", "q4_0", "--token-embedding-type", "q8_0", "--output-type", "q8_0")
REMEDY = "hint: it was measured on another model: `qwen3-export calibrate` measures this one; or leave --imatrix away"
MOE = {"hidden_size": 128, "moe_intermediate_size": 64, "vocab_size": 8192}
OTHERS: dict[str, dict[str, Any]] = {
    "wider": {"hidden_size": 256},
    "wider inside": {"intermediate_size": 512},
    "deeper": {"num_hidden_layers": 4},
    "shallower": {"num_hidden_layers": 1},
}


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("others")
    found = {"this": model, **{name: write_text_model(base / name, **sizes) for name, sizes in OTHERS.items()}}
    for count in (4, 8):
        found[f"{count} experts"] = folder = write_text_model(base / f"{count} experts")
        config = tiny_moe_config(**MOE, num_experts=count)
        write_checkpoint(folder, config, random_tensors(parse_config(config, "test")))
    return found


@pytest.fixture(scope="module")
def matrices(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("matrices")
    for name, folder in models.items():
        outcome = call("calibrate", folder, *SHORT, "--output", base / f"{name}.gguf")
        assert outcome.code == 0, outcome.err
    return {name: base / f"{name}.gguf" for name in models}


def legacy(path: Path, values: dict[str, NDArray]) -> Path:
    """The older form."""
    data = struct.pack("<i", len(values))
    for name, array in values.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, array.size)
        data += array.astype("<f4").tobytes()
    path.write_bytes(data)
    return path


# By whose matrix and for which model: the tensor, what it has, what was wanted.
REFUSED = {
    ("wider", "this"): "blk.0.attn_q.weight has 256 inputs, 128 were expected",
    ("wider inside", "this"): "blk.0.ffn_down.weight has 512 inputs, 256 were expected",
    ("deeper", "this"): "it has blk.2.attn_q.weight, of 4 layers; this model has 2",
    ("4 experts", "8 experts"): "blk.0.ffn_gate_exps.weight has 4 experts, 8 were expected",
    ("4 experts", "this"): "it has blk.0.ffn_gate_exps.weight; this model has blk.0.ffn_gate.weight, "
    "blk.0.ffn_up.weight, blk.0.ffn_down.weight there",
    ("this", "4 experts"): "it has blk.0.ffn_gate.weight; this model has blk.0.ffn_gate_exps.weight, "
    "blk.0.ffn_up_exps.weight, blk.0.ffn_down_exps.weight there",
}


@pytest.mark.parametrize("whose", REFUSED, ids=" for ".join)
def test_a_matrix_that_does_not_fit_is_refused(
    models: dict[str, Path], matrices: dict[str, Path], tmp_path: Path, whose: tuple[str, str]
) -> None:
    matrix, command = matrices[whose[0]], ("gguf", models[whose[1]], "--type", "q4_0", "--output", tmp_path / "m.gguf")
    refused(call(*command, "--imatrix", matrix), 2, f"error: {matrix.name}: {REFUSED[whose]}\n", REMEDY)
    assert names(tmp_path) == []


def test_the_older_form_and_shapes_of_one_size(models: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", models["8 experts"], "--type", "q4_0", "--output", tmp_path / "m.gguf", "--imatrix")
    old = legacy(tmp_path / "old", {"blk.0.ffn_up_exps.weight": np.ones((4, 128), np.float32)})
    refused(call(*command, old), 2, "old: blk.0.ffn_up_exps.weight has 1 × 512 values, 8 × 128 were expected", REMEDY)
    # As many values as the model's, otherwise divided.
    other = tmp_path / "other.gguf"
    Imatrix({"blk.0.ffn_up_exps.weight": ImatrixEntry(np.ones((16, 64), np.float32), np.ones(16, np.float32))}).write(
        other
    )
    refused(call(*command, other), 2, "other.gguf: blk.0.ffn_up_exps.weight has 16 × 64 values, 8 × 128 were", REMEDY)
    fits = legacy(tmp_path / "fits", {"blk.0.ffn_up_exps.weight": np.ones((8, 128), np.float32)})
    assert call(*command, fits).code == 0


def warnings_of(*command: object) -> list[str]:
    outcome = call(*command)
    assert outcome.code == 0, outcome.err
    return [line for line in outcome.err.splitlines() if line.startswith("warning: ")]


def test_what_a_matrix_lacks_is_told(models: dict[str, Path], matrices: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", models["this"], *FITS, "--force", "--output", tmp_path / "m.gguf", "--imatrix")
    first, second = sorted(warnings_of(*command, matrices["shallower"]))
    assert first == (
        "warning: shallower.gguf lacks 7 of the 14 tensors that importance would weigh: blk.1.ffn_down.weight and 6 "
        "others are rounded without. It has 1 of this model's 2 layers, and may be of another model. `qwen3-export "
        "calibrate` measures all of them"
    )
    assert second.startswith("warning: shallower.gguf was measured on shallower, which is not text-model: ")
    own = read_imatrix(matrices["this"])
    entries = {name: entry for name, entry in own.entries.items() if name != "blk.0.attn_k.weight"}
    Imatrix(entries).write(tmp_path / "part.gguf")
    (only,) = warnings_of(*command, tmp_path / "part.gguf")
    assert "part.gguf lacks 1 of the 14 tensors that importance would weigh: blk.0.attn_k.weight are" not in only
    assert "part.gguf lacks 1 of the 14 tensors that importance would weigh: blk.0.attn_k.weight is rounded" in only
    assert "layers" not in only


def test_what_llama_cpp_measures_beside_is_no_other_model(
    models: dict[str, Path], matrices: dict[str, Path], tmp_path: Path
) -> None:
    """Routers, and with `--process-output` the head."""
    own = read_imatrix(matrices["4 experts"])
    entry = ImatrixEntry(np.ones((1, 128), np.float32), np.ones(1, np.float32))
    more = {"blk.0.ffn_gate_inp.weight": entry, "output.weight": entry}
    Imatrix({**own.entries, **more}).write(tmp_path / "more.gguf")
    command = ("gguf", models["4 experts"], *FITS, "--output", tmp_path / "m.gguf")
    assert warnings_of(*command, "--imatrix", tmp_path / "more.gguf") == []


def test_a_matrix_that_names_another_model(models: dict[str, Path], matrices: dict[str, Path], tmp_path: Path) -> None:
    twin = write_text_model(tmp_path / "twin", rope_theta=5e5)
    renamed = Path(shutil.copytree(models["this"], tmp_path / "renamed"))
    command = (*FITS, "--force", "--output", tmp_path / "m.gguf", "--imatrix")
    (warning,) = warnings_of("gguf", twin, *command, matrices["this"])
    assert warning.startswith("warning: this.gguf was measured on text-model, which is not twin: ")
    for folder in (models["this"], renamed):
        assert warnings_of("gguf", folder, *command, matrices["this"]) == []
    # llama.cpp's own matrices name no model.
    Imatrix(read_imatrix(matrices["this"]).entries).write(tmp_path / "nameless.gguf")
    assert warnings_of("gguf", twin, *command, tmp_path / "nameless.gguf") == []
