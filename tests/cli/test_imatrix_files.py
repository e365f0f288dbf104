"""Importance matrices as files: one file each, whatever its name; no model, wherever one is wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen3_export.core.gguf_header import gguf_kind
from qwen3_export.core.imatrix import Imatrix, ImatrixEntry, read_imatrix
from qwen3_export.run.artifact import kind_of
from tests.cli.helpers import call, hashes, names, refused

NAMES = ("imatrix-00001-of-00002.gguf", "imatrix-00002-of-00002.gguf")
NO_MODEL = "an importance matrix, no model\nhint: `gguf --imatrix` takes it, `inspect` shows it"


@pytest.fixture
def matrix(model: Path, tmp_path: Path) -> Path:
    """One that is named like a shard, and alone."""
    path = tmp_path / NAMES[0]
    assert call("calibrate", model, "--samples", "2", "--sequence-length", "32", "--output", path).code == 0
    return path


def other(path: Path, value: float) -> Path:
    """A matrix of one tensor."""
    entry = ImatrixEntry(np.full((1, 128), value, np.float32), np.ones(1, np.float32))
    Imatrix({"blk.0.attn_q.weight": entry}).write(path)
    return path


def test_the_name_of_a_shard_makes_no_difference(matrix: Path, model: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copyfile(matrix, tmp_path / "imatrix.gguf"))
    described = call("inspect", matrix, "--json").json
    assert described == {**call("inspect", plain, "--json").json, "artifact": str(matrix)}
    command = ("gguf", model, "--type", "q4_0", "--output", tmp_path / "m.gguf", "--force", "--imatrix")
    assert call(*command, plain).code == 0
    tensors = read_tensors(tmp_path / "m.gguf")
    outcome = call(*command, matrix)
    assert outcome.code == 0, outcome.err
    assert read_tensors(tmp_path / "m.gguf") == tensors


def read_tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_files_beside_it_are_not_read(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        other(tmp_path / name, number + 1)
    for number, name in enumerate(NAMES):
        found = read_imatrix(tmp_path / name)
        assert found.entries["blk.0.attn_q.weight"].sums[0, 0] == number + 1
        described = call("inspect", tmp_path / name, "--json").json
        assert described["bytes"] == (tmp_path / name).stat().st_size
    (tmp_path / NAMES[0]).write_bytes(b"GGUF, but no header")
    assert call("inspect", tmp_path / NAMES[1]).code == 0


def test_where_a_model_is_wanted_it_is_refused(matrix: Path, made: dict[str, Path], tmp_path: Path) -> None:
    before = hashes(tmp_path)
    for command in (
        ("run", matrix, "--prompt", "hi"),
        ("validate", matrix, "--reference", made["reference"]),
        ("bench", matrix),
        ("triton", matrix, "--output", tmp_path / "out"),
    ):
        refused(call(*command), 2, f"error: {matrix}: {NO_MODEL}")
    refused(call("gguf", matrix, "--output", tmp_path / "out"), 2, f"{matrix} is a file, a checkpoint folder was")
    refused(call("validate", made["gguf"], "--reference", matrix), 2, str(matrix), "the original")
    assert hashes(tmp_path) == before


def test_a_part_of_a_model_is_no_matrix(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    """Also where the other part is missing."""
    part = Path(shutil.copyfile(made["gguf"], tmp_path / "m-00001-of-00002.gguf"))
    command = ("gguf", model, "--type", "q4_0", "--output", tmp_path / "out.gguf", "--imatrix", part)
    refused(call(*command), 2, f"{part}: a GGUF file, but no importance matrix", "calibrate")
    assert names(tmp_path) == [part.name]


def header(path: Path, kind: str, name: str) -> Path:
    """A file of a kind, with a name before it."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(name)
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_model_may_be_called_so(tmp_path: Path) -> None:
    path = header(tmp_path / "m.gguf", "model", "my-imatrix-model")
    assert b"imatrix" in path.read_bytes()[:256]
    assert kind_of(path) == "gguf"


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model_is_told_by_its_header(kind: str, tmp_path: Path) -> None:
    """However far behind the kind stands."""
    path = header(tmp_path / "other.gguf", kind, "long " * 1000)
    assert gguf_kind(path) == kind
    told = "an importance matrix, no model" if kind == "imatrix" else f"its general.type is {kind}, no model"
    refused(call("run", path, "--prompt", "hi"), 2, f"{path}: {told}", "hint: ")
    path.write_bytes(path.read_bytes()[:100])
    assert gguf_kind(path) == "model"
