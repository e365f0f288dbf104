"""`inspect` of the files beside artifacts: named as what they are, and described without torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from qwen3_export.core.imatrix import Imatrix, ImatrixEntry
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.prove.reference import ReferenceFile
from tests.cli.conftest import SHORT
from tests.cli.helpers import call, check_schema, refused, write_text_model

ALONE = """
import sys
for name in ("torch", "onnx", "onnx_ir", "gguf", "onnxruntime", "transformers", "xllamacpp", "numba"):
    sys.modules[name] = None
from qwen3_export.cli import main
main()
"""


def alone(*arguments: object) -> str:
    """`inspect` in a process that has no heavy library."""
    command = [sys.executable, "-c", ALONE, "inspect", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def described(path: Path) -> dict[str, Any]:
    return call("inspect", path, "--json").json


def test_a_reference_file(made: dict[str, Path], model: Path) -> None:
    text = alone(made["reference"], "--json")
    check_schema(text, "inspect")
    values, found = json.loads(text), ReferenceFile(made["reference"])
    with safe_open(made["reference"], "np") as file:
        top, drawn, metadata = file.get_tensor("top_ids"), file.get_tensor("tail_ids"), file.metadata()
    assert (values["kind"], values["source"]) == ("reference", model.name)
    assert values["source_sha256"] == metadata["source_sha256"] == open_source(str(model)).sha256
    assert (values["positions"], values["top_k"]) == top.shape
    assert (values["positions"], values["drawn"]) == drawn.shape
    assert (values["vocab_size"], values["bytes"]) == (8192, made["reference"].stat().st_size)
    rows = Counter[str]()
    for ids, domain in zip(found.samples.ids, found.samples.domains, strict=True):
        rows[domain] += len(ids) - 1
    assert (values["domains"], values["rows"]) == (dict(rows), len(found.samples.ids))
    assert values["kl_is_lower_bound"] == found.is_lower_bound
    shown = call("inspect", made["reference"]).out
    for word in (
        "reference file",
        model.name,
        "the 256 likeliest tokens",
        f"{drawn.shape[1]} others, drawn",
        "KL is estimated",
        *rows,
    ):
        assert word in shown


def test_a_reference_file_with_all_logits_and_tasks(model: Path, tmp_path: Path) -> None:
    tasks, path = tmp_path / "tasks.jsonl", tmp_path / "all.safetensors"
    assert call("tasks", "--output", tasks, "--count", "3").code == 0
    common = ("--tokens", "128", "--window", "64", "--top-k", "0", "--tasks", tasks, "--thinking-budget", "4")
    assert call("reference", model, "--output", path, *common).code == 0
    values = described(path)
    assert (values["top_k"], values["kl_is_lower_bound"], values["tasks"]) == (0, False, 3)
    assert values["thinking_budget"] == 4
    shown = call("inspect", path).out
    assert "all logits (KL is full)" in shown
    assert "3, " in shown


def test_an_importance_matrix(tmp_path: Path) -> None:
    source = write_text_model(tmp_path / "model")
    path = tmp_path / "imatrix.gguf"
    assert call("calibrate", source, "--output", path, *SHORT).code == 0
    text = alone(path, "--json")
    check_schema(text, "inspect")
    values = json.loads(text)
    assert (values["kind"], values["form"]) == ("importance matrix", "GGUF")
    assert (values["datasets"], values["samples"], values["sequence_length"]) == (["bundled"], 8, 64)
    assert values["provenance"]["source.sha256"] == open_source(str(source)).sha256
    assert values["provenance"]["written by"] == "qwen3-export"
    assert len(values["tensors"]) == 14
    assert {(item["fewest"], item["most"]) for item in values["tensors"]} == {(512, 512)}
    shown = call("inspect", path).out
    for word in ("importance matrix", "8 samples of 64 tokens (bundled)", "blk.*.ffn_down.weight", "512"):
        assert word in shown
    refused(call("run", path, "--prompt", "hi"), 2, "importance matrix", "inspect")
    refused(call("onnx", path, "--output", tmp_path / "out"), 2, "no source", "checkpoint")


def test_an_importance_matrix_in_the_older_form(tmp_path: Path) -> None:
    path, name = tmp_path / "imatrix.dat", b"blk.0.attn_q.weight"
    means = np.arange(4, dtype="<f4").tobytes()
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 7, 4) + means
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 5) + b"texts")
    values = described(path)
    assert (values["form"], values["datasets"], values["samples"]) == ("older form", ["texts"], 9)
    assert values["tensors"] == [{"name": name.decode(), "shape": [1, 4], "fewest": 7, "most": 7}]
    assert "another tool" in call("inspect", path).out


def test_a_triton_repository(made: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "repository"
    options = ("--name", "mine", "--instances", "3", "--sequences", "5", "--queue", "7")
    assert call("triton", made["onnx"], "--output", place, *options).code == 0
    values = described(place)
    assert values["kind"] == "Triton repository"
    (found,) = values["models"]
    assert (found["name"], found["backend"], found["instances"]) == ("mine", "python", 3)
    assert (found["parameters"]["sequences"], found["parameters"]["queue"]) == ("5", "7")
    assert found["bytes"] == sum(file.stat().st_size for file in (place / "mine").rglob("*") if file.is_file())
    assert values["provenance"]["written by"] == "qwen3-export"
    shown = call("inspect", place).out
    assert "Triton Inference Server" in shown
    assert "mine" in shown


def test_a_gguf_file_is_served_one_answer_at_a_time(made: dict[str, Path], tmp_path: Path) -> None:
    """By default and where more is asked for, which is said."""
    for number, options in enumerate([(), ("--sequences", "5"), ("--sequences", "1")]):
        place = tmp_path / str(number)
        outcome = call("triton", made["gguf"], "--output", place, *options)
        assert outcome.code == 0, outcome.err
        assert ("warning: --sequences 5 has no effect" in outcome.err) is ("5" in options)
        [found] = call("inspect", place, "--json").json["models"]
        assert found["parameters"]["sequences"] == "1"
    assert call("triton", made["onnx"], "--output", tmp_path / "onnx").code == 0
    [found] = call("inspect", tmp_path / "onnx", "--json").json["models"]
    assert found["parameters"]["sequences"] == "8"


def test_a_triton_repository_of_somebody_else(tmp_path: Path) -> None:
    for name, text in {"a": 'platform: "onnxruntime_onnx"\n', "b": 'backend:"tensorrtllm"\n'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(f'name: "{name}"\n{text}')
    values = described(tmp_path)
    assert [item["backend"] for item in values["models"]] == ["onnxruntime_onnx", "tensorrtllm"]
    assert values["provenance"] == {"written by": "another tool"}


def test_report_and_recipe(made: dict[str, Path], tmp_path: Path) -> None:
    report, recipe = tmp_path / "report", tmp_path / "mine.yaml"
    limits = ("--reference", made["reference"], "--max-kl", "9", "--report", report)
    assert call("validate", made["onnx"], *limits).code == 0
    for place in (report, report / "report.json"):
        values = described(place)
        assert (values["kind"], values["title"], values["passed"]) == ("report", "Validation", True)
        (item,) = values["artifacts"]
        assert (item["artifact"], item["runtime"]) == (str(made["onnx"]), "onnxruntime")
        assert "report.html" in values["files"]
    assert "model-onnx" in call("inspect", report).out
    compared = tmp_path / "gate"
    assert call("gate", report, "--baseline", report, "--report", compared).code == 0
    assert described(compared)["verdict"] == "same"
    recipe.write_text(call("recipes", "show", "edge-w4").out)
    assert described(recipe)["recipe"] == load_recipe("edge-w4").to_dict()
    assert "method: gptq" in call("inspect", recipe).out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello", ("notes.txt", "inspect knows")),
        ("empty.bin", b"", ("empty.bin", "inspect knows")),
        ("a.yaml", b"max_kl: 1", ("a.yaml",)),
        ("report.json", b"{}", ("report.json", "no report")),
        ("short.safetensors", b"12", ("short.safetensors", "too short")),
        ("short.gguf", b"GGUF", ("short.gguf",)),
    ],
)
def test_what_is_none_of_these_is_refused(tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    refused(call("inspect", tmp_path / name), 2, *words)


def test_a_truncated_gguf_file_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    whole = made["gguf"].read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-100])
    said = described(tmp_path / "short.gguf")["truncated"]
    assert said.endswith(f", the file at {len(whole) - 100}")
    assert said in call("inspect", tmp_path / "short.gguf").out
    assert "truncated" not in described(made["gguf"])


def test_a_report_that_somebody_changed_is_shown_as_far_as_it_can_be(tmp_path: Path) -> None:
    odd = {"artifact": 3, "kl_mean": "x", "bytes": True, "runtime": [], "decode": {"tokens_per_second_p50": 1e999}}
    odd |= {"error": 7, "node": {"label": [], "name": 2}}
    values = {"results": [odd, {"artifact": "a", "decode": 7}], "passed": "x", "environment": [1], "verdict": {}}
    (tmp_path / "report.json").write_text(json.dumps(values))
    found = described(tmp_path)
    assert [list(item.values()) for item in found["artifacts"]] == [["3", *[None] * 8], ["a", *[None] * 8]]
    assert (found["passed"], found["verdict"], found["environment"]) == (None, None, None)
    assert "nothing was asked" in call("inspect", tmp_path).out


def test_an_importance_matrix_without_counts_is_refused(tmp_path: Path) -> None:
    entry = ImatrixEntry(np.ones((1, 4), np.float32), np.array([np.nan], np.float32))
    Imatrix({"blk.0.attn_q.weight": entry}).write(tmp_path / "i.gguf")
    refused(call("inspect", tmp_path / "i.gguf", "--json"), 2, "blk.0.attn_q.weight", "how many tokens")


def test_a_checkpoints_file_alone_leads_to_its_folder(model: Path, tmp_path: Path) -> None:
    refused(call("inspect", model / "model.safetensors"), 2, "no reference file", "the checkpoint's folder")
    refused(call("onnx", model / "model.safetensors", "--output", tmp_path / "o"), 2, "is a file", f"give {model}")
