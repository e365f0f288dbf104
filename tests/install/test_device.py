"""On a device only a runtime is installed: artifacts are proved, timed and run there without torch and onnx."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.cli.helpers import call, refused
from tests.install.conftest import ROOT, Environment


def test_wheel_holds_what_the_program_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        model = archive.read("qwen3_export/data/calibration/reference-model/model.safetensors")
        (points,) = (archive.read(name) for name in names if name.endswith("entry_points.txt"))
    data = "qwen3_export/data"
    recipes = {f"{data}/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert len(recipes) > 5
    assert recipes <= names
    assert {f"{data}/calibration/calibration.jsonl", f"{data}/calibration/heldout.jsonl"} <= names
    shipped = ROOT / "calibration" / "reference-model"
    assert {f"{data}/calibration/reference-model/{path.name}" for path in shipped.iterdir()} <= names
    assert {f"qwen3_export/schemas/{path.name}" for path in (ROOT / "qwen3_export/schemas").iterdir()} <= names
    assert "qwen3_export/schemas/validate.v1.json" in names
    assert b"[pytest11]\nqwen3_export.pytest_plugin = qwen3_export.pytest_plugin" in points
    assert model == (shipped / "model.safetensors").read_bytes()


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            top, *rest = name.split("/")
            assert top == "qwen3_export" or top.endswith(".dist-info"), name
            assert not {"tests", "test", "benchmarks", "sources", "makers", "__pycache__"} & set(rest), name
        assert sum(item.file_size for item in archive.infolist()) < 25_000_000


@pytest.mark.parametrize("module", ["torch", "onnx", "onnx_ir", "gguf", "transformers", "tensorrt_rtx"])
def test_nothing_heavy_is_installed(module: str, device: Environment) -> None:
    assert not device.has(module)
    assert device.has("numpy")


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_artifacts_are_proved_on_the_device(kind: str, device: Environment, carried: dict[str, Path]) -> None:
    arguments = ("validate", carried[kind], "--reference", carried["reference"], "--max-kl", "1", "--json")
    there, here = device.cli(*arguments), call(*arguments)
    assert there.code == 0, there.err
    result = there.json["results"][0]
    assert result["kl_mean"] == pytest.approx(here.json["results"][0]["kl_mean"], rel=1e-4)
    assert 0 <= result["kl_estimate"]["lower_bound"] <= result["kl_mean"]
    assert result["reference_sha256"] == here.json["results"][0]["reference_sha256"]


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_artifacts_are_timed_on_the_device(kind: str, device: Environment, carried: dict[str, Path]) -> None:
    options = ("--prompt-tokens", "32", "--new-tokens", "4", "--repeat", "2", "--json")
    outcome = device.cli("bench", carried[kind], *options)
    assert outcome.code == 0, outcome.err
    assert outcome.json["results"][0]["decode"]["tokens_per_second_p50"] > 0


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_artifacts_run_on_the_device(kind: str, device: Environment, carried: dict[str, Path]) -> None:
    arguments = ("run", carried[kind], "--prompt", "What is the sea?", "--max-new-tokens", "6", "--json")
    outcome = device.cli(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.json["new_tokens"] == 6
    assert outcome.json["text"] == call(*arguments).json["text"]


def test_what_needs_more_gives_the_install_line(device: Environment, carried: dict[str, Path]) -> None:
    out = device.outside / "out"
    torch, hint = "torch", "hint: pip install 'qwen3-export["
    source, folder, file = carried["source"], carried["quantized"], carried["reference"]
    cases = {
        ("validate", folder, "--reference", file): (torch, f"{hint}solve]'"),
        ("validate", carried["onnx"], "--reference", source): (torch, f"{hint}solve]'"),
        ("bench", folder): (torch, f"{hint}solve]'"),
        ("run", folder, "--prompt", "hello"): (torch, f"{hint}solve]'"),
        ("quantize", source, "--recipe", "gptq-w4a16-g32", "--output", out): (torch, f"{hint}solve]'"),
        ("quantize", source, "--recipe", "rtn-w4a16-g32", "--output", out): ("numba", f"{hint}rtn]'"),
        ("onnx", source, "--recipe", "rtn-w4a16-g32", "--output", out): ("onnx", f"{hint}onnx]'"),
        ("reference", source, "--output", out): (torch, f"{hint}solve]'"),
        ("demo", "--output", out): (torch, f"{hint}solve]'"),
        ("onnx", folder, "--output", out): ("onnx_ir", f"{hint}onnx]'"),
        ("gguf", folder, "--output", out): ("gguf", f"{hint}gguf]'"),
        ("tensorrt", folder, "--output", out): ("onnx_ir", f"{hint}tensorrt]'"),
    }
    for arguments, words in cases.items():
        refused(device.cli(*arguments), 3, *words)
    assert list(device.outside.iterdir()) == []


def test_what_needs_nothing_works(device: Environment, carried: dict[str, Path]) -> None:
    assert device.cli("inspect", "reference-model", "--json").json["layers"] == 6
    assert device.cli("inspect", carried["quantized"], "--json").json["layers"] == 2
    assert len(device.cli("recipes", "list", "--json").json["recipes"]) > 5
    assert device.cli("--version").code == 0


def test_rounding_needs_no_torch(rounder: Environment, carried: dict[str, Path], tmp_path: Path) -> None:
    assert not rounder.has("torch")
    out = tmp_path / "rounded"
    outcome = rounder.cli("quantize", carried["source"], "--recipe", "rtn-w4a16-g32", "--output", out, "--json")
    assert outcome.code == 0, outcome.err
    there, here = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (out, carried["quantized"])
    )
    assert there == here
