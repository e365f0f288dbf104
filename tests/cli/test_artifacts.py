"""What lies in the artifacts: manifests, sidecars byte for byte, and no path of this machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

import qwen3_export
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from tests.cli.helpers import call, names

SIDECARS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def manifest(made: dict[str, Path]) -> dict[str, Any]:
    return json.loads((made["quantized"] / "qwen3-export.json").read_text())


def test_manifest_says_what_it_was_made_from(manifest: dict[str, Any], model: Path) -> None:
    assert manifest["kind"] == "quantized-checkpoint"
    assert manifest["source"] == {"name": "text-model", "sha256": open_source(str(model)).sha256}
    assert manifest["recipe"] == load_recipe("gptq-w4a16-g32").to_dict()
    assert manifest["seed"] == 0
    assert manifest["calibration"]["rows"] == 8
    assert manifest["calibration"]["tokens"] == 8 * 64
    assert sum(manifest["calibration"]["domains"].values()) == 8
    assert len(manifest["calibration"]["sha256"]) == 64
    assert manifest["versions"]["qwen3-export"] == qwen3_export.__version__
    assert "torch" in manifest["versions"]


def test_manifest_says_how_every_tensor_was_treated(manifest: dict[str, Any], model: Path) -> None:
    assert set(manifest["tensors"]) == set(open_source(str(model)).config.all_linears())
    for tensor in manifest["tensors"].values():
        assert tensor["method"] == "gptq"
        assert tensor["scheme"]["num_bits"] == 4
        assert 0 < tensor["error"] < 0.1
        assert tensor["tokens"] == 8 * 64
    assert {"router", "norms", "embedding", "lm_head"} <= set(manifest["policy"])


def test_sidecars_arrive_byte_for_byte(manifest: dict[str, Any], made: dict[str, Path], model: Path) -> None:
    assert manifest["sidecars"] == {name: sha256_file(model / name) for name in SIDECARS}
    for kind in ("quantized", "onnx", "tensorrt"):
        for name in SIDECARS:
            assert (made[kind] / name).read_bytes() == (model / name).read_bytes()


def test_other_sidecars_travel_too(model: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(model, tmp_path / "source"))
    extra = {"chat_template.jinja": "{{ messages }}", "vocab.json": "{}", "merges.txt": "a b", "LICENSE": "Apache-2.0"}
    for name, text in extra.items():
        (source / name).write_text(text)
    assert call("quantize", source, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "quantized").code == 0
    assert call("onnx", tmp_path / "quantized", "--output", tmp_path / "onnx").code == 0
    for name, text in extra.items():
        assert (tmp_path / "quantized" / name).read_text() == text
        assert (tmp_path / "onnx" / name).read_text() == text


def test_folders_hold_what_the_contract_says(made: dict[str, Path]) -> None:
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    common = sorted([*SIDECARS, "README.md", "qwen3-export.json"])
    quantized = ["config.json", "model.safetensors.index.json", *shards]
    assert names(made["quantized"]) == sorted([*common, *quantized])
    assert names(made["onnx"]) == sorted([*common, "config.json", "genai_config.json", "model.onnx", "model.onnx.data"])
    assert names(made["tensorrt"]) == sorted([*common, "engine.json", "model.onnx", "model.onnx.data", "model.plan"])


def test_shipped_manifests_keep_the_origin(manifest: dict[str, Any], made: dict[str, Path]) -> None:
    for kind in ("onnx", "tensorrt"):
        shipped = json.loads((made[kind] / "qwen3-export.json").read_text())
        assert shipped["kind"] == kind
        assert shipped["source"] == manifest["source"]
        assert shipped["quantized"] == {
            "sha256": open_source(str(made["quantized"])).sha256,
            "recipe": "gptq-w4a16-g32",
        }
        assert shipped["exact"] is (not shipped["inexact_tensors"])
    engine = json.loads((made["tensorrt"] / "engine.json").read_text())
    assert engine["compute_capabilities"] == ["8.9"]
    assert engine["source_sha256"] == manifest["source"]["sha256"]


def test_nothing_names_a_path_of_this_machine(made: dict[str, Path], model: Path) -> None:
    """Artifacts go to other people: no folder of the one who made them may be inside."""
    secrets = [str(made["onnx"].parent), str(model.parent), os.getcwd(), str(Path.home()) + "/"]
    files = [file for path in made.values() for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, (file, secret)


def test_report_names_artifacts_as_they_were_given(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made["onnx"].parent)
    report = tmp_path / "report"
    command = ("validate", made["onnx"].name, "--reference", made["reference"].name, "--report", report)
    assert call(*command).code == 0
    for file in report.iterdir():
        assert str(made["onnx"].parent) not in file.read_text(), file


def test_a_finished_folder_can_be_moved(made: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    moved = Path(shutil.copytree(made["quantized"], tmp_path / "elsewhere"))
    assert (
        call("inspect", moved, "--json").json["quantized"]
        == call("inspect", made["quantized"], "--json").json["quantized"]
    )
    assert call("onnx", moved, "--output", tmp_path / "onnx").code == 0


@pytest.mark.parametrize(("layout", "symmetric"), [("gptq", True), ("gptq", False), ("awq", True), ("awq", False)])
def test_layouts_hold_the_same_numbers(layout: str, symmetric: bool, model: Path, tmp_path: Path) -> None:
    recipe, data = tmp_path / "recipe.yaml", []
    scheme = f"{{num_bits: 4, group_size: 32, symmetric: {str(symmetric).lower()}}}"
    recipe.write_text(f"name: mine\nmethod: rtn\nrules: [{{match: '*', scheme: {scheme}}}]\n")
    for name in ("compressed-tensors", layout):
        folder, onnx = tmp_path / name / model.name, tmp_path / f"{name}-onnx"
        assert call("quantize", model, "--recipe", recipe, "--layout", name, "--output", folder).code == 0
        assert call("onnx", folder, "--output", onnx).code == 0
        data.append(sha256_file(onnx / "model.onnx.data"))
    assert data[0] == data[1]


def test_calibration_that_the_model_writes_itself_needs_no_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    digests = []
    for seed, out in (("0", "a"), ("0", "b"), ("1", "c")):
        command = ("quantize", model, "--recipe", "gptq-w4a16-g32", "--calibration", "self", "--seed", seed)
        options = ("--samples", "2", "--sequence-length", "16", "--output", tmp_path / out, "--json")
        digests.append(call(*command, *options).json["calibration_sha256"])
    assert digests[0] == digests[1] != digests[2]
