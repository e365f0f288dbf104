"""What Hugging Face's optimum exports, of Qwen3 and of another family, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions, greedy
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.environments import environment
from tests.artifact.support import THREADS, random_ids
from tests.conftest import cli, copy_tokenizer, tiny_config, write_checkpoint

OPTIMUM, TRANSFORMERS = ("optimum==2.1.0", "optimum-onnx==0.1.0"), "transformers==4.57.6"
LLAMA = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 8192}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
rope["original_max_position_embeddings"] = 64
LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_scaling=rope)).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="session")
def programs() -> Path:
    """The programs of an environment with optimum; torch is this environment's."""
    return environment(OPTIMUM[1].replace("==", "-"), *OPTIMUM, TRANSFORMERS, shares=True)


def exported(programs: Path, source: Path, output: Path) -> Path:
    """The folder that `optimum-cli` writes of a checkpoint."""
    command = [programs / "optimum-cli", "export", "onnx", "--model", source, "--task", "text-generation-with-past"]
    done = subprocess.run([*command, output], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def test_qwen3_by_optimum_is_validated_and_generates_what_ours_does(
    programs: Path, reference_folder: Path, tmp_path: Path
) -> None:
    source = copy_tokenizer(reference_folder, write_checkpoint(tmp_path / "source", tiny_config(vocab_size=8192)))
    theirs = exported(programs, source, tmp_path / "theirs")
    assert "com.microsoft" not in json.loads(cli("inspect", theirs, "--json").stdout)["opsets"]
    options = ["--reference", source, "--tokens", "256", "--max-kl", "1e-6", "--quiet", "--json"]
    done = cli("validate", theirs, *options)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["runtime"] == "onnxruntime"
    export_onnx(open_checkpoint(source), tmp_path / "ours", "standard")
    found = []
    for folder in (theirs, tmp_path / "ours"):
        session = open_session(folder, RuntimeOptions(threads=THREADS))
        found.append(greedy(session, random_ids(20, 8192), 8))
        session.close()
    np.testing.assert_array_equal(*found)


def test_another_family_by_optimum_is_timed_inspected_and_run(
    programs: Path, reference_folder: Path, tmp_path: Path
) -> None:
    """Whose config.json is none of Qwen3's."""
    made = tmp_path / "llama"
    subprocess.run([programs / "python", "-c", LLAMA, made], check=True, capture_output=True)
    theirs = exported(programs, copy_tokenizer(reference_folder, made), tmp_path / "theirs")
    done = cli("bench", theirs, "--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "1", "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["runtime"] == "onnxruntime"
    for command in (["run", theirs, "--prompt", "What is 2 + 3?", "--max-new-tokens", "4"], ["inspect", theirs]):
        done = cli(*command)
        assert done.returncode == 0, done.stderr
