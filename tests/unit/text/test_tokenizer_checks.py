"""Tokenizers that make the tokenizers library panic, hang or fill the memory: one error, or a harmless setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.errors import CheckpointError
from qwen3_export.text import tokenizer_checks
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.hostile.kinds.tokenizers import SETTINGS

TEXT = "The ocean is wide — 深海 42.\n"


def _with(folder: Path, reference: Path, setting: dict[str, Any]) -> Path:
    values = json.loads((reference / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, **setting}))
    return folder


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: str(setting)[:40])
def test_a_hostile_setting_is_refused_or_has_no_effect(
    tmp_path: Path, reference_folder: Path, setting: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _with(tmp_path, reference_folder, setting)
    if setting.keys() & {"truncation", "padding"}:
        ids = ModelTokenizer(folder).encode(TEXT)
        assert ids.tolist() == ModelTokenizer(reference_folder).encode(TEXT).tolist()
    elif setting.get("model", {}).get("vocab") == {}:
        assert not len(ModelTokenizer(folder).encode(TEXT))
    else:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
            ModelTokenizer(folder).encode(TEXT)
    assert "panicked" not in capfd.readouterr().err


def test_dropout_of_training_does_not_make_ids_random(tmp_path: Path, reference_folder: Path) -> None:
    model = json.loads((reference_folder / "tokenizer.json").read_text())["model"]
    folder = _with(tmp_path, reference_folder, {"model": {**model, "dropout": 0.5}})
    assert ModelTokenizer(folder).encode(TEXT).tolist() == ModelTokenizer(reference_folder).encode(TEXT).tolist()


def test_qwens_own_tokenizer_needs_no_process_and_a_harmless_other_passes(
    tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tokenizer_checks, "confined", lambda function: lambda text: asked.append(text))
    ModelTokenizer(reference_folder)
    assert not asked
    pattern = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
    ModelTokenizer(_with(tmp_path, reference_folder, {"pre_tokenizer": pattern}))
    assert len(asked) == 1
    monkeypatch.undo()
    ModelTokenizer(tmp_path)
