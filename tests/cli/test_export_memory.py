"""An export's own memory counts against `--memory`, beside that of quantizing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_export.core.checkpoint import Checkpoint
from tests.cli.helpers import call, finish, names, refused, start, write_text_model
from tests.conftest import copy_tokenizer, tiny_config, write_checkpoint

# Matrices so wide that their codes, unpacked to be written, count.
WIDE = {"hidden_size": 2048, "intermediate_size": 16384, "head_dim": 128, "num_attention_heads": 16}
RTN = ("--recipe", "rtn-w4a16-g128", "--sequence-length", "32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, reference_model: Checkpoint) -> Path:
    config = tiny_config(**WIDE, num_key_value_heads=8, vocab_size=8192, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path_factory.mktemp("wide") / "model", config)
    copy_tokenizer(reference_model.folder, folder)
    return folder


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
@pytest.mark.parametrize("which", ["reference", "wide"])
def test_an_export_stays_within_what_is_predicted(
    kind: str, which: str, wide: Path, reference_folder: Path, tmp_path: Path
) -> None:
    source = wide if which == "wide" else reference_folder
    output = tmp_path / f"out.{kind}"
    plan = call("plan", source, *RTN, "--no-time", "--format", kind, "--memory", "8GiB", "--json").json
    peak = plan["formats"][kind]["peak_rss_bytes"]
    assert plan["peak_rss_bytes"] >= peak
    given = (kind, source, *RTN, "--output", output, "--memory")
    refused(call(*given, peak - 1), 2, "writing it takes about ", "of memory, --memory allows ")
    assert names(tmp_path) == []
    done = finish(start(*map(str, given), str(plan["peak_rss_bytes"]), "--json"))
    assert done.code == 0, done.err
    taken = json.loads(done.out)["peak_rss_bytes"]
    assert taken <= plan["peak_rss_bytes"]
    assert peak < 2 * taken


def test_a_plan_counts_the_memory_of_the_formats_that_are_asked_for(reference_folder: Path) -> None:
    """A format that does not fit is none that can be had; others can."""
    asked = ("plan", reference_folder, *RTN, "--no-time", "--json")
    alone = call(*asked).json
    onnx, gguf = (alone["formats"][name]["peak_rss_bytes"] for name in ("onnx", "gguf"))
    assert onnx > gguf > alone["peak_rss_bytes"] / 2
    found = call(*asked, "--memory", onnx - 1).json
    assert found["possible"]
    assert found["formats"]["onnx"]["reason"].startswith("writing it takes about ")
    assert found["formats"]["gguf"]["supported"]
    outcome = call(*asked, "--memory", onnx - 1, "--format", "onnx")
    assert outcome.code == 2
    assert "onnx: writing it takes about " in outcome.err


def test_what_is_measured_counts_only_where_it_is(reference_folder: Path, tmp_path: Path) -> None:
    plan = call("plan", reference_folder, *RTN, "--no-time", "--json").json
    limit = plan["formats"]["onnx"]["peak_rss_bytes"] - 1
    given = ("onnx", reference_folder, *RTN, "--memory", limit, "--output", tmp_path / "out")
    refused(call(*given), 2, "writing it takes about ")
    done = finish(start(*map(str, given), "--accuracy-level", "0"))
    assert done.code == 0, done.err


def test_a_recipe_without_calibration_needs_no_positions(tmp_path: Path) -> None:
    """Its default rows are longer than this model takes, and are never made."""
    short = write_text_model(tmp_path / "short", max_position_embeddings=128)
    command = ("gguf", short, "--output", tmp_path / "out.gguf", "--recipe")
    refused(call(*command, "gptq-w4a16-g32"), 2, "--sequence-length 512: the model has 128 positions")
    outcome = call(*command, "rtn-w4a16-g32")
    assert outcome.code == 0, outcome.err
