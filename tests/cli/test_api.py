"""The Python interface: signatures, wrong keywords, progress, notebooks, and the model cards of what it writes."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import qwen3_export
from qwen3_export import api
from qwen3_export.core.model_card import CARD, update_card
from qwen3_export.errors import InputError
from tests.cli.helpers import call, names


@pytest.mark.parametrize(
    ("function", "arguments", "word"),
    [
        (qwen3_export.quantize, {"sample": 3}, "samples"),
        (qwen3_export.validate, {"max_k1": 0.1}, "max_kl"),
        (qwen3_export.bench, {"new_token": 3}, "new_tokens"),
        (qwen3_export.plan, {"memry": 3}, "memory"),
    ],
)
def test_wrong_keyword_names_the_nearest(function, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))) as error:
        function("a", "b", "c", **arguments)
    assert error.value.hint == f"did you mean {word!r}?"


def test_wrong_option_of_an_export(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        qwen3_export.export(model, tmp_path / "out", "onnx", flavour="ort")
    assert error.value.hint == "did you mean 'flavor'?"
    with pytest.raises(InputError, match="export to gguf takes no 'flavor'") as error:
        qwen3_export.export(model, tmp_path / "out", "gguf", flavor="ort")
    assert error.value.hint == "it takes type_name, options"
    assert names(tmp_path) == []


def test_every_option_of_an_exporter_is_in_the_signature() -> None:
    ours = inspect.signature(qwen3_export.export).parameters
    inner = {"checkpoint", "measure", "study_cache"}
    for format in api.FORMATS:
        write = getattr(importlib.import_module(f"qwen3_export.ship.{format}"), f"export_{format}")
        assert set(inspect.signature(write).parameters) - inner <= set(ours), format


def test_signatures_say_what_can_be_given() -> None:
    found = {
        name: inspect.signature(getattr(qwen3_export, name)).parameters
        for name in ("quantize", "plan", "export", "validate", "bench")
    }
    assert not any(p.kind == p.VAR_KEYWORD for parameters in found.values() for p in parameters.values())
    assert {"threads", "text", "tokens", "report", "progress"} <= set(found["validate"])
    assert all(p.annotation for parameters in found.values() for p in parameters.values())


def test_progress_is_called_and_the_result_is_a_table(made: dict[str, Path], tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = qwen3_export.validate(
        [made["onnx"]],
        made["reference"],
        threads=1,
        max_kl=5,
        report=tmp_path / "report",
        progress=lambda *step: steps.append(step),
    )
    assert any(label.startswith("validate ") and done == total for label, done, total in steps)
    table = result._repr_html_()
    assert "<th>KL (nats)</th>" in table
    assert f"{result['results'][0]['kl_mean']:.5g}" in table
    assert (tmp_path / "report" / "report.json").is_file()
    assert "<td>" in qwen3_export.Result(output="a<b", bytes=3)._repr_html_()
    assert "a&lt;b" in qwen3_export.Result(output="a<b")._repr_html_()


def test_every_artifact_folder_has_a_card(made: dict[str, Path]) -> None:
    for name, word in (
        ("quantized", "gptq-w4a16-g32"),
        ("onnx", "gptq-w4a16-g32"),
        ("tensorrt", "compute capabilities"),
    ):
        card = (made[name] / CARD).read_text()
        assert word in card
        assert "text-model (SHA-256" in card
        assert "Nothing yet" in card
        assert "qwen3-export" in card.split("## How to run it")[1]


def test_card_gets_the_measured_table_and_keeps_the_rest(made: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model-onnx"
    shutil.copytree(made["onnx"], folder)
    (folder / CARD).write_text((folder / CARD).read_text() + "\nMy own words.\n")
    command = ("validate", folder, made["gguf"], "--reference", made["reference"], "--threads", "1", "--card", "--json")
    for _ in range(2):
        outcome = call(*command)
        result = outcome.json["results"][0]
        card = (folder / CARD).read_text()
        assert f"{result['kl_mean']:.5f} (95 %" in card
        assert "Nothing yet" not in card
        assert card.count("## What was measured") == card.count("My own words.") == 1
    assert str(folder) in outcome.err
    assert not update_card(tmp_path, result)
    assert not update_card(made["gguf"], result)


def test_gguf_files_of_one_folder_share_a_card(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    moved, rounded = folder / "moved.gguf", folder / "rounded-q4_k_m.gguf"
    for _ in range(2):
        assert call("gguf", made["quantized"], "--output", moved, "--card", "--force").code == 0
    assert call("gguf", model, "--type", "q4_k_m", "--output", rounded, "--card").code == 0
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: gguf\n")
    for word in (
        "gptq-w4a16-g32",
        "| type | q4_k_m |",
        "text-model (SHA-256",
        "run moved.gguf",
        "all arrived unchanged",
    ):
        assert word in card
    assert (card.count("## moved.gguf"), card.count("## rounded-q4_k_m.gguf"), card.count("Nothing yet")) == (1, 1, 2)
    (folder / CARD).write_text(card + "\nMy own words.\n")
    common = ("--reference", made["reference"], "--threads", "1", "--card", "--json")
    result = call("validate", rounded, *common).json["results"][0]
    first, second = (folder / CARD).read_text().split("## rounded-q4_k_m.gguf")
    assert "Nothing yet" in first
    assert f"{result['kl_mean']:.5f} (95 %" in second
    assert second.endswith("\nMy own words.\n")


def test_a_card_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("# Mine\n")
    outcome = call("gguf", model, "--output", tmp_path / "model.gguf", "--card")
    assert outcome.code == 2
    assert "no card of GGUF files" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD]
