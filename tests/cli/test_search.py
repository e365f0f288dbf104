"""`recipes search`: the file it writes, what `quantize` makes of it, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.helpers import call, names, refused, write_text_model

SHORT = ("--samples", "8", "--sequence-length", "64", "--measure-rows", "4")
RESULT = [
    *("output", "recipe", "target_bpw", "bits_per_weight", "expected_kl", "expected_uniform_kl", "units", "seconds"),
    "peak_rss_bytes",
]


def search(model: Path, *arguments: Any) -> Any:
    return call("recipes", "search", model, *SHORT, *arguments)


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("found") / "mixed.yaml"
    outcome = search(model, "--target-bpw", "4.5", "--output", path)
    assert outcome.code == 0, outcome.err
    assert str(path) in outcome.out
    assert names(path.parent) == ["mixed.yaml"]
    return path


def test_the_recipe_is_used_by_quantize(found: Path, model: Path, tmp_path: Path) -> None:
    made = call("quantize", model, "--recipe", found, "--output", tmp_path / "out", *SHORT[:4], "--json").json
    schemes = {layer["name"]: layer["scheme"] for layer in made["layers"]}
    assert len({str(scheme) for scheme in schemes.values()}) > 1
    assert len(schemes) == 14


def test_a_file_is_replaced_only_with_force(found: Path, model: Path) -> None:
    before = found.read_bytes()
    refused(search(model, "--target-bpw", "6", "--output", found), 2, "exists already", "--force")
    assert found.read_bytes() == before
    assert search(model, "--target-bpw", "4.5", "--output", found, "--force", "--threads", "1").code == 0
    assert found.read_bytes() == before


def test_json_and_the_default_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--target-bpw", "5", "--bits", "3,8", "--grids", "symmetric", "--method", "rtn", "--fused")
    values = search(model, *options, "--json").json
    assert not set(RESULT) - set(values)
    assert values["output"] == f"{model.name}-mixed-5bpw.yaml"
    assert values["recipe"] == call("recipes", "show", values["output"], "--json").json
    assert values["bits_per_weight"] <= values["target_bpw"] == 5
    assert len(values["units"]) == 8
    assert {unit["scheme"].split("-")[0] for unit in values["units"]} == {"w3", "w8"}
    written = yaml.safe_load((tmp_path / values["output"]).read_text())
    assert written["method"] == "rtn"


def test_embeddings_are_units_when_asked(model: Path, tmp_path: Path) -> None:
    options = ("--target-bpw", "5", "--grids", "symmetric", "--method", "rtn", "--fused", "--embeddings")
    values = search(model, *options, "--output", tmp_path / "x.yaml", "--json").json
    assert len(values["units"]) == 9
    first = values["units"][0]
    assert (first["match"], first["weights"]) == ("model.embed_tokens", 8192 * 128)
    assert first["probe_kl"] > 0
    rules = {rule["match"]: rule["scheme"] for rule in values["recipe"]["rules"]}
    assert rules["model.embed_tokens"]["num_bits"] in (4, 8)
    shown = search(model, *options, "--output", tmp_path / "y.yaml")
    assert "linears, embedding and head" in shown.out
    made = call("quantize", model, "--recipe", tmp_path / "x.yaml", "--output", tmp_path / "out", "--json").json
    assert made["layers"][0]["name"] == "model.embed_tokens"


def test_types_of_llama_cpp_are_mixed_and_shipped(tmp_path: Path) -> None:
    model = write_text_model(tmp_path / "wide", hidden_size=256)
    options = ("--target-bpw", "4.7", "--grids", "gguf", "--output", tmp_path / "x.yaml", "--json")
    values = search(model, *options).json
    schemes = {rule["match"]: rule["scheme"] for rule in yaml.safe_load((tmp_path / "x.yaml").read_text())["rules"]}
    assert schemes["model.embed_tokens"] == "q6_k"
    assert len(set(schemes.values()) - {"q6_k"}) > 1
    # 128 inputs of o_proj are no block of 256.
    short = {scheme for match, scheme in schemes.items() if "o_proj" in match}
    assert short <= {"iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0"}
    assert set(schemes.values()) - short <= {"q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"}
    assert values["bits_per_weight"] <= 4.7
    made = call("quantize", model, "--recipe", tmp_path / "x.yaml", "--output", tmp_path / "q", "--samples", "8")
    assert made.code == 0, made.err
    assert call("gguf", tmp_path / "q", "--output", tmp_path / "x.gguf", "--json").json["exact"] is True


@pytest.mark.parametrize("target", ["3", "8.2", "-1", "nan"])
def test_a_budget_out_of_reach_names_the_range(model: Path, tmp_path: Path, target: str) -> None:
    outcome = search(model, "--target-bpw", target, "--output", tmp_path / "x.yaml")
    refused(outcome, 2, "4.125 to 8.125 bits per weight", "--bits")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "4,7"), ["--bits", "2, 3, 4, 5, 6, 8, 16"]),
        (("--bits", "4,5"), ["--bits 5", "--grids gguf"]),
        (("--grids", "gguf,signed"), ["gguf", "no other grid"]),
        (("--grids", "gguf", "--method", "rtn"), ["--method", "gptq"]),
        (("--bits", "four"), ["--bits"]),
        (("--grids", "signed,odd"), ["--grids", "asymmetric"]),
        (("--method", "magic"), ["--method", "gptq"]),
        (("--sequence-length", "9999"), ["--sequence-length", "512"]),
        (("--calibration", "nothing.txt"), ["nothing.txt"]),
        (("--fold", "smoothquant"), ["--fold smoothquant", "none, awq"]),
    ],
)
def test_bad_options_are_refused_before_the_work(
    model: Path, tmp_path: Path, options: tuple[str, ...], words: list[str]
) -> None:
    refused(search(model, "--target-bpw", "4.5", "--output", tmp_path / "x.yaml", *options), 2, *words)
    assert names(tmp_path) == []


def test_a_quantized_source_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    outcome = search(made["quantized"], "--target-bpw", "4.5", "--output", tmp_path / "x.yaml")
    refused(outcome, 2, "quantized already")


def test_a_folder_that_cannot_be_written_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = search(model, "--target-bpw", "4.5", "--output", tmp_path / "file" / "x.yaml")
    refused(outcome, 2, os.fspath(tmp_path / "file"))
