"""What a cluster's workers need of nodes and of this machine's memory, and the files of their results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.cluster.session import Node
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import load_recipe
from qwen3_export.errors import ClusterError, InputError, ResourceError, StateError
from qwen3_export.solve.cluster import Run, _places, workers_here
from qwen3_export.solve.cluster.part_files import read_parts, write_parts
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.preflight import check_memory
from qwen3_export.solve.quantize import quantize

SETTINGS = QuantizeSettings(samples=4, sequence_length=32, threads=1)


def test_parts_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    parts = {
        "tensor": torch.randn(3, 5).to(torch.bfloat16),
        "strip": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        "scales": np.array([[1.5, 2.0]], ml_dtypes.bfloat16),
        "float8": np.array([1, 2], ml_dtypes.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "nothing": None,
        "error": 0.1 + 0.2,
        "inner": {"names": ["a", "b"], "array": np.arange(3, dtype=np.uint8)},
    }
    write_parts(tmp_path / "parts", parts)
    found = read_parts(tmp_path / "parts")
    assert found["error"] == parts["error"]
    assert found["nothing"] is None
    assert found["inner"]["names"] == ["a", "b"]
    for key in ("tensor", "strip", "empty"):
        assert torch.equal(found[key], parts[key])
    for key in ("scales", "float8"):
        assert found[key].dtype == parts[key].dtype
        assert found[key].tobytes() == parts[key].tobytes()
    (tmp_path / "parts").write_bytes((tmp_path / "parts").read_bytes()[:-1])
    with pytest.raises(StateError, match="cut off"):
        read_parts(tmp_path / "parts")


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_of(tmp_path: Path, source: Path) -> Run:
    return Run(
        source, load_recipe("rtn-w4a16-g128"), None, SETTINGS, tmp_path, tmp_path, "compressed-tensors", False, False
    )


def test_nodes_with_too_little_memory_are_left_out_by_name(reference_folder: Path, tmp_path: Path) -> None:
    small, large, none = (Node(name, name, cpus, 0, memory) for name, cpus, memory in (
        ("small", 1, 1 << 30), ("large", 1, 4 << 30), ("head", 0, 4 << 30)))  # fmt: skip
    notes, run = Notes(), run_of(tmp_path, reference_folder)
    assert _places([small, large, none], None, 2 << 30, run, notes) == [large]
    assert [note.split()[0] for note in notes.notes] == ["small", "head"]
    lack = r"no node of the cluster offers 8\.00 GiB of memory, "
    with pytest.raises(ResourceError, match=lack) as caught:
        _places([small, large, none], None, 8 << 30, run, Notes())
    assert "ray start --memory=BYTES sets" in str(caught.value.hint)


def test_what_nodes_lack_is_named(reference_folder: Path, tmp_path: Path) -> None:
    run, small, head = run_of(tmp_path, reference_folder), Node("a", "a", 1, 0, 1 << 30), Node("b", "b", 0, 0, 22 << 30)
    on_gpu = replace(run, settings=replace(SETTINGS, device="cuda"))
    for nodes, asked, words, hint in (
        ([head], run, "offers a CPU, which", "ray start --num-cpus=N sets"),
        ([small, head], run, r"offers 2\.00 GiB of memory and a CPU together, which", "--memory=BYTES, --num-cpus=N"),
        ([head], on_gpu, "offers a CPU and a GPU, which", "--num-cpus=N, --num-gpus=N"),
    ):
        with pytest.raises(ClusterError, match=words) as caught:
            _places(nodes, None, 2 << 30, asked, Notes())
        assert hint in str(caught.value.hint)


def test_memory_counts_the_workers_on_this_machine(reference_folder: Path, tmp_path: Path) -> None:
    checkpoint, recipe = open_checkpoint(reference_folder), load_recipe("rtn-w4a16-g128")
    needed = check_memory(checkpoint.config, None, False, None, without_torch=True)
    assert check_memory(checkpoint.config, None, False, needed, without_torch=True) == needed
    settings = replace(SETTINGS, memory=2 * needed)
    with pytest.raises(InputError, match=r"4 workers with .* each, and the command itself") as caught:
        quantize(checkpoint, recipe, tmp_path / "out", replace(settings, cluster="local:4"))
    assert "fewer workers" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
    assert [workers_here(address, SETTINGS) for address in ("local:3", "local", "host:1")] == [3, 1, 0]
