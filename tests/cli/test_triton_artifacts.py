"""Artifacts that a Triton repository takes: all parts of a split model; nothing that no server could start."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from qwen3_export.run.generate import Sampling, chat
from tests.cli.helpers import call, names, refused

_QUESTION = [{"role": "user", "content": "What does ocean mean?"}]


@pytest.fixture(scope="module")
def split(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The parts of a split GGUF file."""
    folder = tmp_path_factory.mktemp("split")
    command = ("gguf", model, "--type", "q4_0", "--split-max-size", "1M")
    outcome = call(*command, "--output", folder / "model.gguf")
    assert outcome.code == 0, outcome.err
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) > 1
    return parts


def test_all_parts_of_a_split_model_are_served(split: list[Path], tmp_path: Path) -> None:
    """Whichever part was named; llama.cpp opens what the server is told to open."""
    wanted = {part.name.removeprefix("model"): part.read_bytes() for part in split}
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in split)).hexdigest()
    for number, part in enumerate((split[0], split[-1])):
        place = tmp_path / str(number)
        outcome = call("triton", part, "--output", place)
        assert outcome.code == 0, outcome.err
        found = {file.name.removeprefix("artifact"): file.read_bytes() for file in place.glob("qwen3/1/*.gguf")}
        assert found == wanted
        [described] = call("inspect", place, "--json").json["models"]
        opened = place / "qwen3/1" / described["parameters"]["artifact"]
        sampling = Sampling(max_new_tokens=4)
        assert chat(opened, _QUESTION, False, sampling)["text"] == chat(split[0], _QUESTION, False, sampling)["text"]
        assert digest in (place / "README.md").read_text()


def test_parts_that_are_missing_or_misnamed_are_refused(split: list[Path], tmp_path: Path) -> None:
    def asked(artifact: Path, *words: str) -> None:
        refused(call("triton", artifact, "--output", tmp_path / "out"), 2, *words)
        assert not (tmp_path / "out").exists()

    folder = tmp_path / "parts"
    shutil.copytree(split[0].parent, folder)
    first, last = folder / split[0].name, folder / split[-1].name
    alone = folder / "alone.gguf"
    shutil.copyfile(first, alone)
    asked(alone, "alone.gguf: by its header it is part 1 of", "by its name 1 of 1", "PREFIX-00001-of-")
    first.rename(folder / "kept")
    asked(last, first.name, "is missing", "keep all parts in one folder")
    shutil.copyfile(last, first)
    asked(last, f"{first.name}: by its header it is part {len(split)} of", "by its name 1 of")
    assert names(tmp_path) == ["parts"]
