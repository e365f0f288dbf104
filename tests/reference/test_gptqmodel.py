"""GPTQ and AWQ folders in GPTQModel, which owns the layouts today: the same codes, weights and logits.

GPTQModel multiplies in 16 bits. Its scales are turned to fp32 after loading, so that its own unpacking and
its own kernel are compared with ours in fp32; its fp16 answers are compared too, to what fp16 rounds away.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensor import QuantizedTensor
from tests.cli.helpers import call, write_text_model
from tests.conftest import tiny_moe_config
from tests.reference.models import TOLERANCE, dequantized, our_logits, random_rows, relative_error

# One group: the fixture quantizes several folders and opens them in a process of GPTQModel's own.
pytestmark = [
    pytest.mark.xdist_group("gptqmodel"),
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None, reason="GPTQModel is not installed; `make test` does it"
    ),
]
# Eleven bits of mantissa, through every layer.
IN_FP16 = 2e-2
VOCABULARY = 8192
PROCESS = Path(__file__).with_name("gptqmodel_process.py")

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4 g128": ("gptq", {"num_bits": 4, "group_size": 128}),
    "w4 g32 asymmetric": ("gptq", {"num_bits": 4, "group_size": 32, "symmetric": False}),
    "w4 channel": ("gptq", {"num_bits": 4, "strategy": "channel"}),
    "w4 g64 signed scales": ("gptq", {"num_bits": 4, "group_size": 64, "signed_scales": True}),
    "w8 g128": ("gptq", {"num_bits": 8, "group_size": 128}),
    "w8 g32 asymmetric": ("gptq", {"num_bits": 8, "group_size": 32, "symmetric": False}),
    "w3 g32": ("gptq", {"num_bits": 3, "group_size": 32}),
    "w3 g64 asymmetric": ("gptq", {"num_bits": 3, "group_size": 64, "symmetric": False}),
    "w2 g32": ("gptq", {"num_bits": 2, "group_size": 32}),
    "w2 g16 asymmetric": ("gptq", {"num_bits": 2, "group_size": 16, "symmetric": False}),
    "awq g128": ("awq", {"num_bits": 4, "group_size": 128}),
    "awq g32 asymmetric": ("awq", {"num_bits": 4, "group_size": 32, "symmetric": False}),
}
# The settings of GPTQModel and what we call its scheme.
THEIRS: dict[str, tuple[dict[str, Any], str]] = {
    "w4 g128": ({"method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "w4-g128-sym"),
    "w4 g32 desc_act": ({"method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "w4-g32-sym"),
    "w4 g32 asymmetric": ({"method": "gptq", "bits": 4, "group_size": 32, "sym": False}, "w4-g32-asym"),
    "w3 g32": ({"method": "gptq", "bits": 3, "group_size": 32}, "w3-g32-sym"),
    "w8 g128": ({"method": "gptq", "bits": 8, "group_size": 128}, "w8-g128-sym"),
    "awq g128": ({"method": "awq", "bits": 4, "group_size": 128}, "w4-g128-sym"),
    "awq g32 asymmetric": ({"method": "awq", "bits": 4, "group_size": 32, "sym": False}, "w4-g32-asym"),
}
REFERENCE, HEAD = "the reference model", "an untied head"
EXPERTS = "experts"


@dataclass(frozen=True)
class Answer:
    """A folder, and what GPTQModel says that it holds."""

    folder: Path
    tensors: dict[str, np.ndarray]
    rows: list[np.ndarray]

    def of(self, part: str) -> dict[str, np.ndarray]:
        """`{linear: its units or its weight}`."""
        return {n.removesuffix(f".{part}"): a for n, a in self.tensors.items() if n.endswith(f".{part}")}


class Room:
    """A folder in which jobs are gathered, and one process that does them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[dict[str, Any]] = []
        self.rows = random_rows(VOCABULARY)
        np.savez(folder / "rows.npz", *self.rows)
        np.savez(folder / "calibration.npz", *random_rows(VOCABULARY, [64] * 8, seed=1))

    def load(self, name: str, folder: Path) -> None:
        """Ask what a folder holds."""
        target = self.folder / f"{name}.safetensors"
        self.jobs.append({"load": str(folder), "rows": str(self.folder / "rows.npz"), "output": str(target)})

    def run(self) -> dict[str, Answer]:
        """`{name: answer}` of every folder that was asked about."""
        (self.folder / "jobs.json").write_text(json.dumps(self.jobs))
        command = [sys.executable, str(PROCESS), str(self.folder / "jobs.json")]
        # It writes logs where it runs.
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=self.folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        loads = [job for job in self.jobs if "load" in job]
        return {
            Path(job["output"]).stem: Answer(Path(job["load"]), load_file(job["output"]), self.rows) for job in loads
        }


def ours(
    source: Path | str, output: Path, layout: str, scheme: dict[str, Any], matches: tuple[str, ...] = ("*",)
) -> Path:
    """A folder that our command line writes."""
    recipe, rules = output.with_suffix(".yaml"), [{"match": match, "scheme": scheme} for match in matches]
    recipe.write_text(yaml.safe_dump({"name": "test", "method": "rtn", "rules": rules}))
    outcome = call("quantize", source, "--recipe", recipe, "--output", output, "--layout", layout)
    assert outcome.code == 0, outcome.err
    return output


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """GPTQModel's answers about all of our folders and all of its own."""
    base = tmp_path_factory.mktemp("gptqmodel")
    source = write_text_model(base / "source")
    room = Room(base)
    for name, (layout, scheme) in OURS.items():
        room.load(f"ours {name}", ours(source, base / f"ours {name}", layout, scheme))
    w4 = OURS["w4 g128"][1]
    room.load(f"ours {REFERENCE}", ours("reference-model", base / REFERENCE, "gptq", w4))
    untied = write_text_model(base / "untied", tie_word_embeddings=False)
    room.load(f"ours {HEAD}", ours(untied, base / HEAD, "gptq", w4, ("lm_head", "*")))
    experts = write_text_model(base / "moe", **{**tiny_moe_config(), "vocab_size": VOCABULARY})
    for layout in ("gptq", "awq"):
        name = f"{EXPERTS} {layout}"
        room.load(f"ours {name}", ours(experts, base / name, layout, {"num_bits": 4, "group_size": 16}))
    calibration = str(base / "calibration.npz")
    for name, (config, _) in THEIRS.items():
        output = base / f"theirs {name}"
        room.jobs.append({"quantize": str(source), "rows": calibration, "config": config, "output": str(output)})
        room.load(f"theirs {name}", output)
    return room.run()


def assert_same(answer: Answer) -> None:
    """Codes and weights bit for bit, logits within fp32 rounding, and near those in fp16."""
    checkpoint, weights, units = open_checkpoint(answer.folder), answer.of("weight"), answer.of("units")
    found = dequantized(answer.folder)
    assert set(found) == set(weights) == set(checkpoint.schemes) >= set(checkpoint.config.all_linears())
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, weights[name], name)
        tensor = checkpoint.linear(name)
        assert isinstance(tensor, QuantizedTensor)
        zero = tensor.scheme.midpoint if tensor.zeros is None else of_columns(tensor, tensor.zeros)
        np.testing.assert_array_equal(tensor.codes.astype(np.float32) - zero, units[name], name)
    for number, logits in enumerate(our_logits(answer.folder, answer.rows)):
        assert relative_error(answer.tensors[f"fp32.{number}"], logits) <= TOLERANCE
        half = np.abs(answer.tensors[f"fp16.{number}"].astype(np.float32) - logits).max(-1) / np.abs(logits).max()
        # A near tie of a router may fall the other way in fp16: that token takes another expert, and those after it see
        # that. So of experts a quarter of the tokens must agree; their weights and fp32 logits do above, all of them.
        assert np.quantile(half, 0.25 if checkpoint.config.num_experts else 1.0) <= IN_FP16


def of_columns(tensor: QuantizedTensor, values: np.ndarray) -> np.ndarray:
    """One value per weight `[out, in]`, from one per group."""
    inputs = tensor.shape[1]
    group = np.arange(inputs) // tensor.scheme.group_length(inputs) if tensor.g_idx is None else tensor.g_idx
    return values.astype(np.float32)[:, group]


@pytest.mark.parametrize("name", OURS)
def test_gptqmodel_gives_the_weights_and_logits_of_our_folders(answers: dict[str, Answer], name: str) -> None:
    assert_same(answers[f"ours {name}"])


@pytest.mark.parametrize("name", [REFERENCE, HEAD, f"{EXPERTS} gptq", f"{EXPERTS} awq"])
def test_gptqmodel_gives_the_weights_and_logits_of_whole_models(answers: dict[str, Answer], name: str) -> None:
    assert_same(answers[f"ours {name}"])
    assert ("lm_head.weight" in answers[f"ours {name}"].tensors) == (name == HEAD)


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_gptqmodel_writes_is_read_as_it_reads_it(answers: dict[str, Answer], name: str) -> None:
    answer = answers[f"theirs {name}"]
    checkpoint = open_checkpoint(answer.folder)
    assert {scheme.label for scheme in checkpoint.schemes.values()} == {THEIRS[name][1]}
    assert bool(checkpoint.reordered) == ("desc_act" in name)
    assert_same(answer)
