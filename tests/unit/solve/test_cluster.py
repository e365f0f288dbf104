"""`quantize --cluster` without Ray: workers that are threads give the bytes of a single process, and survive losses."""

from __future__ import annotations

import errno
import random
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import (
    CheckpointError,
    ClusterError,
    InputError,
    ResourceError,
)
from qwen3_export.solve.cluster.member import Member
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
def test_workers_that_die_again_and_again_end_the_run(source: Path, wanted: Wanted, tmp_path: Path) -> None:
    expected = wanted("paper")
    with threads_for_nodes(2, range(30, 100)), pytest.raises(ResourceError, match="lost 6 times") as caught:
        run(source, "paper", tmp_path / "out", cluster="host:1")
    assert "the same command starts over" in str(caught.value.hint)
    assert not (tmp_path / "out.partial").exists()
    with threads_for_nodes(2):
        assert run(source, "paper", tmp_path / "out", cluster="host:1") == expected


@mixture
def test_a_run_goes_on_with_and_without_workers(source: Path, wanted: Wanted, tmp_path: Path) -> None:
    expected = wanted("all rungs")
    with threads_for_nodes(2) as session:
        run(source, "all rungs", tmp_path / "whole", cluster="host:1")
    with threads_for_nodes(2, range(session.asked - 20, 1000)), pytest.raises(ResourceError) as caught:
        run(source, "all rungs", tmp_path / "out", cluster="host:1")
    assert "the same command goes on" in str(caught.value.hint)
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


@mixture
@pytest.mark.parametrize(
    ("name", "where"),
    [("paper", "output_folder.TensorFileWriter"), ("without inputs", "output_folder.TensorFileWriter"),
     ("paper", "cluster.member.solve_block")],
)  # fmt: skip
def test_a_full_disk_under_a_worker_names_the_folder(
    name: str, where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"qwen3_export.solve.{where}", full)
    with threads_for_nodes(2), pytest.raises(OSError, match="No space left") as caught:
        run(source, name, tmp_path / "out", cluster="host:1")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(tmp_path / "out.partial"))


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


@mixture
@pytest.mark.parametrize("apart", [False, True], ids=["beside", "with scratch"])
def test_a_command_killed_while_workers_start_leaves_nothing_in_the_finished_folder(
    source: Path, apart: bool, wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there when a worker has been seen is what a kill leaves beside finished blocks."""
    look, left = Member.look, tmp_path / "left"
    places = [tmp_path / "out.partial", *([tmp_path / "scratch"] if apart else [])]
    changes: dict[str, Any] = {"cluster": "host:1", **({"scratch": places[-1]} if apart else {})}

    def killed(self: Member, token: str) -> dict[str, Any]:
        look(self, token)
        for place in places:
            shutil.copytree(place, left / place.name)
        raise KeyboardInterrupt

    with threads_for_nodes(1) as session:
        run(source, "paper", tmp_path / "whole", **changes)
    with threads_for_nodes(1, range(session.asked - 2, 1000)), pytest.raises(ResourceError):
        run(source, "paper", tmp_path / "out", **changes)
    with threads_for_nodes(1), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Member, "look", killed)
        run(source, "paper", tmp_path / "out", **changes)
    assert [*left.rglob("shared-*")]
    for place in places:
        shutil.rmtree(place)
        (left / place.name).rename(place)
    with threads_for_nodes(1):
        assert run(source, "paper", tmp_path / "out", **changes) == wanted("paper")
    assert not [*tmp_path.rglob("shared-*")]


@mixture
def test_unfit_nodes_leave_an_unfinished_run_as_it_is(source: Path, wanted: Wanted, tmp_path: Path) -> None:
    with threads_for_nodes(2) as session:
        run(source, "paper", tmp_path / "whole", cluster="host:1")
    with threads_for_nodes(2, range(session.asked - 2, 1000)), pytest.raises(ResourceError):
        run(source, "paper", tmp_path / "out", cluster="host:1")
    with threads_for_nodes(2, cpus=0), pytest.raises(ClusterError, match="offers a CPU, which"):
        run(source, "paper", tmp_path / "out", cluster="host:1")
    assert (tmp_path / "out.partial" / "state" / "progress.json").exists()
    assert run(source, "paper", tmp_path / "out") == wanted("paper")


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
    with (
        threads_for_nodes(2, [20]),
        pytest.raises(ResourceError, match=r"node \d: the worker there was lost") as caught,
    ):
        search(open_checkpoint(source), settings, tmp_path)
    assert caught.value.hint == "the same command starts over"
    assert not list(tmp_path.iterdir())
