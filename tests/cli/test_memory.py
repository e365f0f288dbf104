"""Memory that was measured: flat when layers are added, and within `--memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_export.core.checkpoint import Checkpoint
from tests.cli.helpers import finish, start
from tests.conftest import tiny_config, write_checkpoint

SHALLOW, DEEP = 2, 8


def model(folder: Path, layers: int, reference: Checkpoint) -> Path:
    """Two million weights per layer: 8 MB in fp32."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 128}
    write_checkpoint(folder, tiny_config(**sizes, vocab_size=8192, num_hidden_layers=layers))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((reference.folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("recipe", ["rtn-w4a16-g128", "gptq-w4a16-g128", "gptq-max-w4a16-g128"])
def test_a_model_four_times_as_deep_takes_the_same_memory(
    tmp_path: Path, reference_model: Checkpoint, recipe: str
) -> None:
    peaks = {}
    for layers in (SHALLOW, DEEP):
        source, output = model(tmp_path / f"model-{layers}", layers, reference_model), tmp_path / f"out-{layers}"
        size = ["--samples", "8", "--sequence-length", "32"] if recipe.startswith(("gptq", "awq")) else []
        done = finish(start("quantize", str(source), "--recipe", recipe, "--output", str(output), *size, "--json"))
        assert done.code == 0, done.err
        peaks[layers] = json.loads(done.out)["peak_rss_bytes"]
    # Six more layers hold 24 MB in bf16 and 48 MB in fp32.
    assert peaks[DEEP] - peaks[SHALLOW] < 15e6


def test_a_run_stays_within_its_memory(tmp_path: Path, reference_model: Checkpoint) -> None:
    source = model(tmp_path / "model", SHALLOW, reference_model)
    given = ["quantize", str(source), "--recipe", "gptq-max-w4a16-g128", "--samples", "8", "--sequence-length", "32"]
    refused = finish(start(*given, "--output", str(tmp_path / "small"), "--memory", "500MiB"))
    assert refused.code == 2
    assert "--memory allows 0.49 GiB" in refused.err
    assert not (tmp_path / "small.partial").exists()
    needed = float(refused.err.split("about ")[1].split(" GiB")[0]) + 0.01
    done = finish(start(*given, "--output", str(tmp_path / "out"), "--memory", f"{needed:.2f}GiB", "--json"))
    assert done.code == 0, done.err
    assert json.loads(done.out)["peak_rss_bytes"] <= needed * 2**30
