"""`--cluster` on real Ray nodes and in real processes: same bytes, whoever is killed and whenever."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_export.core.outputs import partial_path
from tests.cli.cluster_kills import Deaths, kill_worker_then_driver, wait_for_end
from tests.cli.helpers import call, finish, hashes, names, refused, reported, start, write_text_model
from tests.conftest import tiny_moe_config

pytestmark = pytest.mark.xdist_group("ray")
OPTIONS = ("--recipe", "gptq-w4a16-g32", "--samples", "12", "--sequence-length", "64")
# Moments at which a worker and then the driver is killed: half of them for each of two models.
KILLS = 10


class Nodes:
    """Ray nodes of one processor each on this machine; `grow` starts more."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster  # noqa: TID251  (nodes, not work)

        self._cluster, self.count = Cluster(), 0

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def grow(self, count: int) -> None:
        """Every node offers something that no other has: `device-0`, `device-1`, …"""
        while self.count < count:
            offers = {f"device-{self.count}": 1}
            self._cluster.add_node(num_cpus=1, resources=offers, include_dashboard=False, object_store_memory=80 << 20)
            self.count += 1

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        found = Nodes()
        try:
            found.grow(1)
            yield found
        finally:
            found.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 3, "hidden_size": 288, "intermediate_size": 544}
    moe = tiny_moe_config(**sizes, num_experts=6, moe_intermediate_size=64)
    return {
        "dense": write_text_model(folder / "dense", **sizes),
        "moe": write_text_model(folder / "moe", **{**moe, "vocab_size": 8192, "max_position_embeddings": 512}),
    }


@pytest.fixture(scope="module")
def wanted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Hashes of every file of runs in one process."""
    folder = tmp_path_factory.mktemp("wanted")
    for name, model in models.items():
        assert call("quantize", model, *OPTIONS, "--output", folder / name).code == 0
    return {name: hashes(folder / name) for name in models}


def _same_bytes_on(
    count: int, nodes: Nodes, models: dict[str, Path], wanted: dict[str, dict[str, str]], folder: Path
) -> None:
    """Assert that so many nodes all work, and give the bytes of one process."""
    nodes.grow(count)
    for name, model in models.items():
        outcome = call("quantize", model, *OPTIONS, "--output", folder / name, "--cluster", nodes.address, "--json")
        assert len(outcome.json["workers"]) == count
        assert len({worker["node"] for worker in outcome.json["workers"]}) == count
        assert hashes(folder / name) == wanted[name]
    assert names(folder) == sorted(models)


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_nodes_give_the_bytes_of_one_process(
    count: int, nodes: Nodes, models: dict[str, Path], wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    _same_bytes_on(count, nodes, models, wanted, tmp_path)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_killed_workers_and_drivers_change_no_byte(
    name: str, nodes: Nodes, models: dict[str, Path], wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """A run goes on after each of its drivers' deaths; one that has finished starts over."""
    nodes.grow(2)
    chosen, out, deaths, logs = random.Random(name), tmp_path / "out", Deaths(), list[Path]()
    arguments = ["quantize", str(models[name]), *OPTIONS, "--output", str(out), "--cluster", nodes.address]
    while not deaths.suffice(KILLS // 2):
        assert len(logs) < 2 * KILLS, deaths
        logs.append(tmp_path / f"log-{len(logs)}")
        code = kill_worker_then_driver(arguments, logs[-1], chosen, deaths)
        assert code in (0, -signal.SIGKILL), logs[-1].read_text()
        if out.exists():
            assert hashes(out) == wanted[name]
            shutil.rmtree(out)
    assert call(*arguments).code == 0
    assert hashes(out) == wanted[name]
    assert not partial_path(out).exists()
    wait_for_end(logs)


@pytest.mark.parametrize(("name", "method"), [("dense", "rtn"), ("moe", "gptq")])
def test_a_search_on_nodes_finds_the_recipe_of_one_process(
    name: str, method: str, nodes: Nodes, models: dict[str, Path], tmp_path: Path
) -> None:
    nodes.grow(2)
    options = ("--target-bpw", "5", "--grids", "symmetric", "--fused", "--measure-rows", "4", *OPTIONS[2:])
    asked = ("recipes", "search", models[name], "--method", method, *options)
    files = tmp_path / "alone.yaml", tmp_path / "shared.yaml"
    alone = call(*asked, "--output", files[0], "--json")
    shared = call(*asked, "--output", files[1], "--cluster", nodes.address, "--json", "-v")
    assert len(set(re.findall(r"^worker \d+ on .*, process (\d+)$", shared.err, re.MULTILINE))) == nodes.count
    assert files[0].read_bytes() == files[1].read_bytes()
    for key in ("recipe", "bits_per_weight", "expected_kl", "units"):
        assert shared.json[key] == alone.json[key]
    assert names(tmp_path) == ["alone.yaml", "shared.yaml"]


def test_workers_started_here_are_quiet_and_leave_nothing(
    models: dict[str, Path], wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    options = (*OPTIONS, "--output", tmp_path / "out", "--cluster", "local:2", "--json")
    scratch = Path(tempfile.mkdtemp(dir="/tmp", prefix="q"))
    (home := tmp_path / "home").mkdir()
    outcome = finish(start("quantize", models["moe"], *options, env={"TMPDIR": str(scratch), "HOME": str(home)}))
    assert len(outcome.json["workers"]) == 2
    assert "ray" not in outcome.err.lower().replace("array", "")
    assert hashes(tmp_path / "out") == wanted["moe"]
    assert names(scratch) == []
    # A token that Ray left there would be asked for on every cluster that is started later.
    assert ".ray" not in names(home)
    scratch.rmdir()


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("local:0", 2, "--cluster local:0"),
        ("local:many", 2, "--cluster local:many"),
        ("somewhere", 2, "HOST:PORT was expected"),
        ("ray://host:1", 2, "HOST:PORT was expected"),
        ("127.0.0.1:65536", 2, "HOST:PORT was expected"),
        ("::1:6379", 2, "HOST:PORT was expected"),
        ("127.0.0.1:1", 3, "no Ray cluster answers there"),
        ("[::1]:1", 3, "no Ray cluster answers there"),
    ],
)
def test_addresses_that_are_none_are_refused(
    address: str, code: int, words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    outcome = call("quantize", models["dense"], *OPTIONS, "--output", tmp_path / "out", "--cluster", address)
    refused(outcome, code, words)
    assert names(tmp_path) == []


def test_a_node_that_starts_too_slowly_is_no_bug(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray  # noqa: TID251  (its start fails, nothing is computed)

    def slow(**_: object) -> None:
        # Ray raises an Exception of no kind there.
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    command = ("quantize", models["dense"], "--recipe", "rtn-w4a16-g32", "--cluster", "local")
    refused(call(*command, "--output", tmp_path / "out"), 3, "timed out during startup", "leave --cluster away")


def test_without_ray_the_line_that_installs_it_is_given(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    outcome = call("quantize", models["dense"], *OPTIONS, "--output", tmp_path / "out", "--cluster", "local")
    refused(outcome, 3, "--cluster needs ray", "pip install 'qwen3-export[cluster]'")


def test_artifacts_are_measured_on_the_nodes_that_are_named(
    nodes: Nodes, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task per artifact and label, one report, and the figures of a run here."""
    nodes.grow(2)
    monkeypatch.chdir(made["gguf"].parent)
    labels = ("--cluster", nodes.address, "--node", "device-0", "--node", "device-1")
    asked = ("validate", made["gguf"].name, made["onnx"].name, "--reference", made["reference"].name, "--json")
    here = call(*asked).json["results"]
    found = call(*asked, *labels, "--max-kl", "9", "--report", tmp_path / "report").json
    assert [item["node"]["label"] for item in found["results"]] == ["device-0"] * 2 + ["device-1"] * 2
    assert [item["kl_mean"] for item in found["results"]] == [item["kl_mean"] for item in here] * 2
    assert found["passed"]
    text = (tmp_path / "report" / "report.md").read_text()
    for name in (made["gguf"].name, made["onnx"].name):
        for label in ("device-0", "device-1"):
            assert f"{name} on {label}" in text
    rows = call("inspect", tmp_path / "report", "--json").json["artifacts"]
    assert [(row["artifact"], row["node"], row["kl_mean"]) for row in rows] == [
        (item["artifact"], item["node"]["label"], item["kl_mean"]) for item in found["results"]
    ]
    assert "device-1" in call("inspect", tmp_path / "report").out

    options = ("--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1", "--json")
    timed = call("bench", made["gguf"].name, *options, *labels[:4])
    assert [item["node"]["label"] for item in timed.json["results"]] == ["device-0"]
    assert call("validate", made["gguf"].name, *asked[3:], *labels[:4], "--max-kl", "0").code == 1


def test_the_report_of_a_lab_has_the_others_where_one_fails(
    nodes: Nodes, made: dict[str, Path], tmp_path: Path
) -> None:
    lost, report = tmp_path / "empty.gguf", tmp_path / "report"
    lost.touch()
    labels = ("--cluster", nodes.address, "--node", "device-0", "--report", report)
    for command in (
        ("bench", lost, made["gguf"], "--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1"),
        ("validate", lost, made["gguf"], "--reference", made["reference"]),
    ):
        outcome = call(*command, *labels, "--force", "--json")
        found = reported(outcome, command[0])
        assert outcome.code == 2
        assert [item["artifact"] for item in found["results"]] == [str(made["gguf"])]
        (item,) = found["failed"]
        assert (item["artifact"], item["node"]["label"]) == (str(lost), "device-0")
        assert item["error"].startswith("device-0: ")
        assert f"{lost.name} on device-0: not measured: " in (report / "report.md").read_text()


def test_what_is_named_twice_is_measured_twice(nodes: Nodes, made: dict[str, Path], tmp_path: Path) -> None:
    """The same artifact, and the same node: one row for each, numbered as without a cluster."""
    options = ("--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1", "--report", tmp_path / "report")
    labels = ("--cluster", nodes.address, "--node", "device-0", "--node", "device-0")
    found = call("bench", made["gguf"], made["gguf"], *options, *labels, "--json").json["results"]
    assert [item["artifact"] for item in found] == [str(made["gguf"])] * 4
    text = (tmp_path / "report" / "report.md").read_text()
    for number in ("", " (2)", " (3)", " (4)"):
        assert f"| {made['gguf'].name} on device-0{number} |" in text


def test_what_no_node_offers_is_refused_by_name(nodes: Nodes, made: dict[str, Path], tmp_path: Path) -> None:
    asked = ("validate", made["gguf"], "--reference", made["reference"])
    refused(call(*asked, "--cluster", nodes.address, "--node", "jetson"), 2, "--node jetson", "there are device-0")
    refused(call(*asked, "--node", "jetson"), 2, "--node jetson", "--cluster")
    refused(call("bench", made["gguf"], "--cluster", "127.0.0.1:1"), 3, "no Ray cluster answers there")


def test_four_nodes_give_the_bytes_of_one_process(
    nodes: Nodes, models: dict[str, Path], wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """After all that needs fewer nodes, since more workers take longer to start."""
    _same_bytes_on(4, nodes, models, wanted, tmp_path)
