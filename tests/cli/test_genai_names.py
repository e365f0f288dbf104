"""Folders whose genai_config.json names a graph: that one is opened; another one only with a warning."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

from qwen3_export.errors import InputError, InputWarning
from qwen3_export.run.artifact import kind_of
from qwen3_export.run.onnx_files import find_onnx
from tests.cli.helpers import call, refused


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    assert call("onnx", model, "--output", folder).code == 0
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def name(folder: Path, filename: object) -> Path:
    """Write a name into genai_config.json."""
    path = folder / "genai_config.json"
    values = json.loads(path.read_text())
    values["model"]["decoder"]["filename"] = filename
    path.write_text(json.dumps(values))
    return folder


def moved(folder: Path, *places: str) -> None:
    """The graph, with its data, in other places of the folder."""
    for place in places:
        graph = folder / place
        graph.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "model.onnx", graph)
        if graph.parent != folder:
            shutil.copyfile(folder / "model.onnx.data", graph.parent / "model.onnx.data")
    (folder / "model.onnx").unlink()


def opened(artifact: Path) -> str:
    """The graph that is opened, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = find_onnx(artifact)
    return str(files.graph.relative_to(files.folder))


@pytest.mark.parametrize("target", ["cpu", "web", "standard"])
def test_our_folders_name_what_is_opened(target: str, model: Path, exported: Path, tmp_path: Path) -> None:
    made = exported if target == "cpu" else tmp_path / target
    if target != "cpu":
        assert call("onnx", model, "--target", target, "--output", made).code == 0
    assert opened(made) == ("onnx/model_fp16.onnx" if target == "web" else "model.onnx")


@pytest.mark.parametrize("stated", ["a.onnx", "b.onnx", "cpu/b.onnx", "./b.onnx", "onnx/model_q4.onnx"])
def test_of_several_graphs_the_named_one_is_opened(folder: Path, stated: str) -> None:
    moved(folder, "a.onnx", "b.onnx", "cpu/b.onnx", "onnx/model.onnx", "onnx/model_q4.onnx")
    assert opened(name(folder, stated)) == str(Path(stated))


def test_a_graph_that_is_found_by_its_name_alone_is_run_and_served(folder: Path, tmp_path: Path) -> None:
    moved(folder, "cpu/b.onnx")
    refused(call("inspect", folder), 2, str(folder))
    name(folder, "cpu/b.onnx")
    assert kind_of(folder) == "onnx"
    assert call("inspect", folder, "--json").json["graph"] == "b.onnx"
    assert call("run", folder, "--prompt", "What?", "--max-new-tokens", "2").code == 0
    assert call("triton", folder, "--output", tmp_path / "served").code == 0
    data = folder / "cpu" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    outcome = call("triton", folder, "--output", tmp_path / "again")
    refused(outcome, 2, "cpu/model.onnx.data: 100 bytes, b.onnx expects")


@pytest.mark.parametrize("stated", ["gone.onnx", "../model.onnx", "", 3, ["model.onnx"], "cpu", "x" * 300, "a\0b"])
def test_a_name_of_nothing_is_told_and_the_only_graph_opened(folder: Path, stated: object) -> None:
    (folder / "cpu").mkdir()
    name(folder, stated)
    (folder.parent / "model.onnx").touch()
    outcome = call("run", folder, "--prompt", "What?", "--max-new-tokens", "2")
    assert outcome.code == 0
    told = f"warning: {folder}/genai_config.json: model.decoder.filename is {stated!r:.80}, which is not in "
    assert outcome.err.count(told + "the folder; model.onnx is opened here. To mend it, name model.onnx there\n") == 1


def test_a_name_of_nothing_beside_several_graphs_is_refused(folder: Path) -> None:
    moved(folder, "a.onnx", "b.onnx")
    with pytest.raises(InputError, match=r"\(a\.onnx, b\.onnx\), and genai_config\.json names 'c\.onnx', which is not"):
        find_onnx(name(folder, "c.onnx"))


def test_a_graph_that_is_given_and_not_named_is_told(folder: Path) -> None:
    moved(folder, "a.onnx", "b.onnx")
    name(folder, "a.onnx")
    assert opened(folder / "a.onnx") == "a.onnx"
    with pytest.warns(InputWarning, match=r"is 'a\.onnx', the graph that onnxruntime-genai opens; b\.onnx is opened"):
        assert find_onnx(folder / "b.onnx").graph.name == "b.onnx"
