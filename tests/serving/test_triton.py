"""Repositories that a real tritonserver runs: what it answers is what `run` answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.source import open_source
from qwen3_export.errors import MissingRuntimeError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.generate import Sampling, chat
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.triton.artifact import REQUIREMENTS
from tests.cli.helpers import call
from tests.serving import tritonserver
from tests.serving.client_questions import DRAWN, QUESTIONS

TOKENS = 12


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tritonserver.Environment:
    needed = " ".join(dict.fromkeys(f"{REQUIREMENTS['onnx']} {REQUIREMENTS['gguf']}".split()))
    return tritonserver.make(tmp_path_factory.mktemp("triton"), needed)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("served")
    made = {"onnx": base / "onnx", "gguf": base / "model.gguf", "folder": base / "folder"}
    for command in (
        ("onnx", "reference-model", "--recipe", "rtn-w4a16-g32", "--accuracy-level", "0", "--output", made["onnx"]),
        ("gguf", "reference-model", "--type", "q8_0", "--output", made["gguf"]),
        ("quantize", "reference-model", "--recipe", "rtn-w4a16-g128", "--output", made["folder"]),
    ):
        outcome = call(*command)
        assert outcome.code == 0, outcome.err
    return made


def ask(environment: tritonserver.Environment, repository: Path, log: Path) -> dict[str, Any]:
    """What the client found.

    Rarely the server aborts by itself (`double free or corruption`, `Signal (6) received.`), which is known of it;
    memcheck finds nothing in the model's process. Then another is started, twice at most.
    """
    script = Path(__file__).with_name("client.py")
    for _ in range(3):
        with tritonserver.serving(environment, repository, "qwen3", log) as (http, grpc):
            command = [environment.python, script, http, grpc, "qwen3", repository, str(TOKENS)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0 or "Signal (6) received." not in log.read_text():
            break
    assert done.returncode == 0, done.stderr + log.read_text()[-2000:]
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def expected(artifact: Path) -> list[str]:
    """What `run` answers to every question."""
    sampling = Sampling(max_new_tokens=TOKENS)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [chat(artifact, messages, False, sampling)["text"] for messages in asked]


def ran(artifact: Path, *options: object) -> tuple[str, str, int]:
    """Text, stop reason and number of tokens of the command `run`."""
    found = call("run", artifact, "--prompt", QUESTIONS[0], *options, "--json").json
    return found["text"], {"end": "stop"}.get(found["stop"], found["stop"]), found["new_tokens"]


def served(answer: tuple[int, str]) -> tuple[str, str, int]:
    """The same of the server's answer."""
    code, text = answer
    assert code == 200, text
    found = json.loads(text)
    return found["text_output"], found["finish_reason"], found["num_output_tokens"]


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_server_answers_as_run_does(
    kind: str, environment: tritonserver.Environment, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    outcome = call(
        "triton", artifacts[kind], "--output", repository, "--queue", "8", "--sequences", "4", "--threads", "1"
    )
    assert outcome.code == 0, outcome.err
    found, wanted = ask(environment, repository, tmp_path / "log"), expected(artifacts[kind])
    assert found["backend"] == "python"
    assert found["decoupled"] is True
    for key in ("generate", "chat", "after"):
        code, text = found[key]
        assert code == 200, text
        assert json.loads(text)["text_output"] == wanted[0], key
    pieces = [json.loads(line.removeprefix("data: ")) for line in found["stream"][1].splitlines() if line]
    assert "".join(piece["text_output"] for piece in pieces) == wanted[0]
    assert len(pieces) > 3
    assert pieces[-1]["finish_reason"] in ("stop", "length")
    code, text = found["stream without its path"]
    assert (code, list(json.loads(text))) == (200, ["error"]), "docs/serving.md says what Triton does here"
    # Eight at once fit into the queue: every one is answered, and as if it were alone.
    assert [item.get("text_output") for item in found["together"]] == wanted
    for name, (thinking, sampling) in DRAWN.items():
        given = [text for key, value in sampling.items() for text in (f"--{key.replace('_', '-')}", value)]
        switch = "--thinking" if thinking else "--no-thinking"
        answer = ran(artifacts[kind], switch, "--max-new-tokens", TOKENS, *given)
        assert served(found[name]) == answer, name
    assert served(found["plain"]) == ran(artifacts[kind])
    assert len({served(found[name])[0] for name in (*DRAWN, "generate")}) == len(DRAWN) + 1
    assert found["grpc"]["text"] == wanted[0], found["grpc"]
    assert found["grpc"]["pieces"] > 3
    # It was cancelled in the middle; what it cost afterwards is counted in `tests/unit/run/test_serving.py`.
    assert (found["cancelled"]["pieces"], found["cancelled"]["reason"]) == (2, "")
    assert [code for code, _ in found["bad"]].count(200) == 0
    assert all("Traceback" not in text and "unexpected" not in text for _, text in found["bad"])
    assert found["flood"]["other"] == 0
    assert found["flood"]["answered"] > 0
    assert found["flood"]["busy"] > 0


def test_a_quantized_folder_is_laid_out_for_vllm(artifacts: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    outcome = call("triton", artifacts["folder"], "--output", repository, "--name", "q", "--mount", "/srv", "--json")
    assert outcome.json["backend"] == "vllm"
    engine = json.loads((repository / "q/1/model.json").read_text())
    assert engine["model"] == "/srv/q/1/model"
    assert (repository / "q/1/model/config.json").read_bytes() == (artifacts["folder"] / "config.json").read_bytes()
    assert 'backend: "vllm"' in (repository / "q/config.pbtxt").read_text()


def model_config(environment: tritonserver.Environment, path: Path) -> dict[str, Any]:
    """A config.pbtxt through Triton's own protobuf."""
    script = (
        "import sys; from google.protobuf import json_format, text_format;"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig;"
        "print(json_format.MessageToJson(text_format.Parse(open(sys.argv[1]).read(), ModelConfig())))"
    )
    done = subprocess.run([environment.python, "-c", script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_plan_is_laid_out_for_its_gpu(environment: tritonserver.Environment, tmp_path: Path) -> None:
    """Built and checked: the server needs the plan's GPU. Without one the model is refused by name."""
    export_tensorrt(open_source("reference-model"), tmp_path / "trt", capabilities=("8.9",))
    outcome = call("triton", tmp_path / "trt", "--output", tmp_path / "repository", "--json")
    assert outcome.json["backend"] == "python"
    version = json.loads((tmp_path / "trt" / "engine.json").read_text())["version"]
    assert f"tensorrt-rtx=={version}" in outcome.json["requirements"]
    found = model_config(environment, tmp_path / "repository/qwen3/config.pbtxt")
    assert found["instanceGroup"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [0]}]
    device = found["parameters"]["device"]["stringValue"]
    assert device == "plan"
    served = tmp_path / "repository/qwen3/1/artifact"
    assert (served / "model.plan").read_bytes() == (tmp_path / "trt/model.plan").read_bytes()
    with pytest.raises(MissingRuntimeError, match="NVIDIA"):
        open_session(served, RuntimeOptions(device=device))
    (tmp_path / "trt/model.plan").unlink()
    refused = call("triton", tmp_path / "trt", "--output", tmp_path / "other")
    assert refused.code == 2
    assert "its plan has not been built" in refused.err


def test_every_repository_has_its_model_card(artifacts: dict[str, Path], tmp_path: Path) -> None:
    for name, artifact in artifacts.items():
        outcome = call("triton", artifact, "--output", tmp_path / name, "--name", "served", "--json")
        card = (tmp_path / name / "README.md").read_text()
        assert "a model repository for Triton Inference Server" in card
        origin = sha256_file(artifact) if artifact.is_file() else open_source("reference-model").sha256
        assert origin in card
        assert f"pip install {outcome.json['requirements']}" in card
        assert "localhost:8000/v2/models/served/generate_stream" in card
        assert "README.md" in {item["path"] for item in outcome.json["files"]}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--name", "a/b"), "--name"),
        (("--name", "q" * 256), "--name: 256 letters"),
        (("--mount", ""), "--mount ''"),
        (("--mount", "models"), "--mount 'models'"),
        (("--queue", "0"), "--queue"),
        (("--sequences", "0"), "--sequences"),
        (("--instances", "-3"), "--instances"),
        (("--threads", "100000"), "--threads"),
    ],
)
def test_what_cannot_be_served_is_refused(
    options: tuple[str, str], word: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    outcome = call("triton", artifacts["gguf"], "--output", tmp_path / "repository", *options)
    assert outcome.code == 2
    assert word in outcome.err
    assert not (tmp_path / "repository").exists()


# A scheme and its layout; why vLLM does not run it; and what helps.
UNSERVED = [
    ("type: kquant, ggml_type: q4_1", "ggml", "does not read q4_1", "qwen3-export gguf,"),
    ("num_bits: 3, group_size: 32", "gptq", "no kernel for 3-bit integers", "another recipe"),
    ("num_bits: 4, group_size: 16", "compressed-tensors", "groups of 32, 64 and 128, not 16", "qwen3-export onnx,"),
]


@pytest.mark.parametrize(("scheme", "layout", "reason", "remedy"), UNSERVED)
def test_folders_that_vllm_does_not_load_are_refused(
    scheme: str, layout: str, reason: str, remedy: str, tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "folder"
    rules = f"rules:\n  - match: 'model.layers.*'\n    scheme: {{{scheme}}}\n"
    recipe.write_text(f"name: mine\nmethod: rtn\nlayout: {layout}\n{rules}")
    outcome = call("quantize", "reference-model", "--recipe", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    outcome = call("triton", folder, "--output", tmp_path / "repository")
    assert outcome.code == 2
    assert f"{folder}: vLLM cannot load it: " in outcome.err
    assert reason in outcome.err
    assert remedy in outcome.err
    assert not (tmp_path / "repository").exists()


def test_a_folder_for_browsers_is_no_folder_for_vllm(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """It has a config.json too, and no weights that vLLM reads."""
    web = tmp_path / "web"
    assert call("onnx", artifacts["folder"], "--target", "web", "--output", web).code == 0
    outcome = call("triton", web, "--output", tmp_path / "repository")
    assert outcome.code == 2
    assert "a folder for browsers" in outcome.err
    assert "--target cpu" in outcome.err
    assert not (tmp_path / "repository").exists()


def test_no_artifact_no_repository(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    for artifact in (tmp_path / "file", tmp_path, tmp_path / "missing"):
        outcome = call("triton", artifact, "--output", tmp_path / "repository")
        assert outcome.code == 2, outcome.err
        assert str(artifact) in outcome.err
