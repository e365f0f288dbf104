"""GGUF files that llama.cpp's own quantizer wrote: every command takes them, beside ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import call
from tests.reference import llama_quantize


@pytest.fixture(scope="module")
def theirs(gguf_file: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model in Q4_K_M."""
    output = tmp_path_factory.mktemp("theirs") / "theirs.gguf"
    llama_quantize.quantize(gguf_file("original", "bf16").path, output, 15)
    return output


def test_it_is_validated_timed_inspected_and_run(theirs: Path, reference_folder: Path, tmp_path: Path) -> None:
    validated = call(
        *("validate", theirs, "--reference", reference_folder, "--tokens", "256", "--threads", "1"),
        *("--max-kl", "0.2", "--report", tmp_path / "report", "--json"),
    )
    [result] = validated.json["results"]
    assert (result["runtime"], result["bytes"]) == ("llama.cpp", theirs.stat().st_size)
    assert 1e-3 < result["kl_mean"] < 0.2
    timed = call("bench", theirs, "--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "1", "--json")
    assert timed.json["results"][0]["decode"]["tokens_per_second_p50"] > 0
    inspected = call("inspect", theirs, "--json")
    assert {"q4_k", "q6_k"} <= inspected.json["types"].keys()
    spoken = call("run", theirs, "--prompt", "What is 2 + 3?", "--max-new-tokens", "4", "--json")
    assert json.loads(spoken.out)["new_tokens"] > 0
