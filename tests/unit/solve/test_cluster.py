"""`quantize --cluster` without Ray: workers that are threads give the bytes of a single process, and survive losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.cluster.session import Node
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import (
    CheckpointError,
    InputError,
    ResourceError,
    StateError,
)
from qwen3_export.solve.cluster import Run, _places
from qwen3_export.solve.cluster.part_files import read_parts, write_parts
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.mixed_precision.search import SearchSettings, search
from qwen3_export.solve.quantize import quantize
from tests.conftest import copy_tokenizer, tiny_config, tiny_moe_config, write_checkpoint
from tests.unit.solve.cluster_of_threads import threads_for_nodes

# Whole runs, many of them.
pytestmark = pytest.mark.slow

# Wider than a column strip of the moments, and than the rows that are solved together.
SIZES = {"vocab_size": 8192, "hidden_size": 288, "intermediate_size": 544}
CONFIGS = {
    "dense": tiny_config(**SIZES),
    "moe": tiny_moe_config(**SIZES, num_experts=5, moe_intermediate_size=64, mlp_only_layers=[1]),
}
SCHEME = {"num_bits": 4, "group_size": 16}
RECIPES: Mapping[str, dict[str, Any]] = {
    "paper": {"method": "gptq"},
    "all rungs": {
        "method": "gptq",
        "options": {"scale_search": "solve", "descent": 2, "target_shift": True, "fold": "awq", "output_rows": 2},
    },
    "awq": {"method": "awq"},
    "asymmetric": {"method": "gptq", "scheme": {**SCHEME, "symmetric": False}},
    "static fp8": {
        "method": "rtn",
        "scheme": {"type": "float", "num_bits": 8, "strategy": "channel", "activations": "static-tensor"},
    },
    "without inputs": {"method": "rtn"},
    "without inputs, by torch": {"method": "rtn", "scheme": {"type": "float", "num_bits": 8, "strategy": "channel"}},
}
SAMPLES, LENGTH = 9, 32
SETTINGS = QuantizeSettings(samples=SAMPLES, sequence_length=LENGTH, threads=1)
Wanted = Callable[[str], dict[str, str]]
# Its second layer is dense.
mixture = pytest.mark.parametrize("source", ["moe"], indirect=True)


def recipe(name: str) -> Recipe:
    chosen = dict(RECIPES[name])
    rules = [{"match": "*.1.*.v_proj", "scheme": None}, {"match": "*", "scheme": chosen.pop("scheme", SCHEME)}]
    # Experts of both kinds: those that enough tokens reach, and those that are lent their layer's moments.
    return Recipe.from_dict({"name": "test", "rules": rules, "experts": {"min_tokens": 200}, **chosen}, "test")


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / request.param, CONFIGS[request.param])
    return copy_tokenizer(reference_folder, folder)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    """`wanted(recipe)` → `{file name: sha256}` of the run in one process, made once."""
    folder, found = tmp_path_factory.mktemp("wanted"), dict[str, dict[str, str]]()

    def get(name: str) -> dict[str, str]:
        if name not in found:
            found[name] = run(source, name, folder / name)
        return found[name]

    return get


def run(source: Path, name: str, output: Path, **changes: Any) -> dict[str, str]:
    """`{file name: sha256}` of the folder; nothing else is left."""
    quantize(open_checkpoint(source), recipe(name), output, replace(SETTINGS, **changes))
    assert not output.with_name(f"{output.name}.partial").exists()
    return {path.name: sha256_file(path) for path in sorted(output.iterdir())}


@pytest.mark.parametrize("name", RECIPES)
def test_workers_give_the_bytes_of_one_process(source: Path, name: str, wanted: Wanted, tmp_path: Path) -> None:
    with threads_for_nodes(3):
        assert run(source, name, tmp_path / "out", cluster="host:1") == wanted(name)


@mixture
@pytest.mark.parametrize("seed", range(1))
def test_what_lost_workers_were_given_is_done_by_others(
    source: Path, seed: int, wanted: Wanted, tmp_path: Path
) -> None:
    expected = wanted("all rungs")
    deaths = random.Random(seed).sample(range(1, 60), 8)
    with threads_for_nodes(3, deaths) as session:
        assert run(source, "all rungs", tmp_path / "out", cluster="host:1") == expected
    assert session.asked > max(deaths)


@mixture
def test_workers_that_die_again_and_again_end_the_run_which_can_go_on(
    source: Path, wanted: Wanted, tmp_path: Path
) -> None:
    expected = wanted("paper")
    with threads_for_nodes(2, range(30, 100)), pytest.raises(ResourceError, match="lost 6 times") as caught:
        run(source, "paper", tmp_path / "out", cluster="host:1")
    assert "the same command goes on" in str(caught.value.hint)
    with threads_for_nodes(2):
        assert run(source, "paper", tmp_path / "out", cluster="host:1") == expected


@mixture
def test_a_run_goes_on_with_and_without_workers(source: Path, wanted: Wanted, tmp_path: Path) -> None:
    expected = wanted("all rungs")
    with threads_for_nodes(2) as session:
        run(source, "all rungs", tmp_path / "whole", cluster="host:1")
    with threads_for_nodes(2, range(session.asked - 20, 1000)), pytest.raises(ResourceError):
        run(source, "all rungs", tmp_path / "out", cluster="host:1")
    pieces = tmp_path / "out.partial" / "state" / "pieces"
    assert [path.name for path in pieces.iterdir() if path.is_dir()] == ["0001"]
    assert any((pieces / "0001").iterdir())
    assert run(source, "all rungs", tmp_path / "out") == expected


def test_an_error_of_a_worker_is_the_run_s(tmp_path: Path, reference_folder: Path) -> None:
    folder = write_checkpoint(tmp_path / "broken", CONFIGS["dense"])
    copy_tokenizer(reference_folder, folder)
    checkpoint = open_checkpoint(folder)
    broken = {name: checkpoint.read(name).copy() for name in checkpoint.files}
    broken["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
    write_checkpoint(folder, CONFIGS["dense"], broken)
    for name in ("paper", "without inputs"):
        with (
            threads_for_nodes(2),
            pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: it holds NaN"),
        ):
            run(folder, name, tmp_path / "out", cluster="host:1")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"output": "gone"}, "does not see"),
        ({"source": "another"}, "does not see"),
        ({"arithmetic": {"products": "otherwise"}}, "node 1 has another kind of arithmetic: products otherwise"),
    ],
)
def test_nodes_that_are_not_alike_are_refused_by_name(
    what: dict[str, Any], words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_export.solve.cluster.member import Member

    look = Member.look

    def other(self: Member, token: str) -> dict[str, Any]:
        found = look(self, "none" if "output" in what else token)
        if self._number != 2:
            return look(self, token)
        return {**found, **what, "arithmetic": {**found["arithmetic"], **what.get("arithmetic", {})}}

    monkeypatch.setattr(Member, "look", other)
    with threads_for_nodes(2), pytest.raises(InputError, match=words) as caught:
        run(source, "paper", tmp_path / "out", cluster="host:1")
    assert "node 1" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("more", [{}, {"embeddings": True, "method": "rtn"}], ids=["linears", "embeddings too"])
def test_a_search_finds_the_same_on_many_nodes(source: Path, more: dict[str, Any], tmp_path: Path) -> None:
    settings = SearchSettings(4.5 if not more else 5.5, samples=16, sequence_length=32, measure=3, threads=1, **more)
    checkpoint = open_checkpoint(source)
    alone = search(checkpoint, settings, tmp_path)
    with threads_for_nodes(3):
        shared = search(checkpoint, replace(settings, cluster="host:1"), tmp_path)
    assert shared.recipe == alone.recipe
    assert [unit.kl for unit, _ in shared.units] == [unit.kl for unit, _ in alone.units]
    assert not list(tmp_path.iterdir())


def test_a_search_ends_where_a_worker_is_lost(source: Path, tmp_path: Path) -> None:
    settings = SearchSettings(4.5, samples=16, sequence_length=32, measure=3, threads=1, cluster="host:1")
    with threads_for_nodes(2, [20]), pytest.raises(ResourceError, match=r"node \d: the worker there was lost"):
        search(open_checkpoint(source), settings, tmp_path)
    assert not list(tmp_path.iterdir())


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
    return Run(source, recipe("paper"), None, SETTINGS, tmp_path, tmp_path, "compressed-tensors", False, False)


def test_nodes_with_too_little_memory_are_left_out_by_name(source: Path, tmp_path: Path) -> None:
    small, large, none = (Node(name, name, cpus, 0, memory) for name, cpus, memory in (
        ("small", 1, 1 << 30), ("large", 1, 4 << 30), ("head", 0, 4 << 30)))  # fmt: skip
    notes, run = Notes(), run_of(tmp_path, source)
    assert _places([small, large, none], None, 2 << 30, run, notes) == [large]
    assert [note.split()[0] for note in notes.notes] == ["small", "head"]
    with pytest.raises(ResourceError, match=r"no node of the cluster has the 8\.00 GiB"):
        _places([small, large], None, 8 << 30, run, Notes())


def test_workers_of_this_machine_must_fit_into_its_memory(source: Path, tmp_path: Path) -> None:
    here = Node("here", "here", 4, 0, 5 << 30)
    assert _places([here], 2, 2 << 30, run_of(tmp_path, source), Notes()) == [here, here]
    with pytest.raises(ResourceError, match=r"3 workers need about 6\.00 GiB") as caught:
        _places([here], 3, 2 << 30, run_of(tmp_path, source), Notes())
    assert caught.value.hint == "--cluster local:2"
