"""`--target web` in transformers.js, in Node: the folder loads as it is, and greedy text is our own session's, each
prompt alone and all of them as one left-padded batch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.progress import Progress
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError, UnsupportedError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.onnx.experts import LOOP, QMOE
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.artifact.support import THREADS, round_to_nearest, tiny_with_tokenizer
from tests.conftest import tiny_moe_config

VERSION, NEW = "4.3.2", 12
PROMPTS = ["The quick brown fox", "def add(a, b):\n    ", "长城是", "Once"]
# Two releases of ONNX Runtime round fp16 differently: a token may differ where the best two are this close.
TIE = 0.1
# Prompts that our session continues without such a tie, at least two of them on any processor: that decides the codes.
CLEAR = ['{"name": "', "import numpy as", "Once upon a time, there was", "def add(a, b):\n    "]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """transformers.js from npm, without anybody's install scripts, kept for the next run."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qwen3-export-tests"
    folder = cache / f"transformers.js-{VERSION}"
    if shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Another run may install at the same time: what has the name is complete.
        new = Path(tempfile.mkdtemp(dir=cache))
        (new / "package.json").write_text('{"name": "tests", "private": true}')
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        subprocess.run([*command, f"@huggingface/transformers@{VERSION}"], cwd=new, check=True, capture_output=True)
        with contextlib.suppress(OSError):
            new.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
    shutil.copy(Path(__file__).with_name("greedy.mjs"), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quantized: Any) -> Path:
    """A web folder in three data files."""
    output = tmp_path_factory.mktemp("web") / "model"
    export_onnx(open_source(str(quantized("edge-w4"))), output, target="web", max_shard_size=2_000_000)
    return output


def check(folder: Path, tokenizer: ModelTokenizer, prompt: str, found: list[int]) -> None:
    """Our session, fed with what transformers.js chose, would have chosen the same, up to the end of the text."""
    ids, stops = tokenizer.encode(prompt), tokenizer.stop_ids()
    count = next((i + 1 for i, token in enumerate(found) if token in stops), NEW)
    session = open_session(folder, RuntimeOptions(threads=THREADS))
    logits = session.prefill(np.concatenate([ids, found[: count - 1]]).astype(np.int32))[len(ids) - 1 :]
    session.close()
    assert len(logits) == count
    assert (logits.max(-1) - logits[np.arange(count), found[:count]] < TIE).all()


def greedy_text(folder: Path, tokenizer: ModelTokenizer, prompt: str) -> tuple[list[int], float]:
    """Our session's greedy continuation, and how far apart the best two tokens are where they are closest."""
    session, found, margins = open_session(folder, RuntimeOptions(threads=THREADS)), list[int](), list[float]()
    logits = session.prefill(tokenizer.encode(prompt))[-1]
    while len(found) < NEW and not set(found) & set(tokenizer.stop_ids()):
        second, first = np.sort(logits)[-2:]
        found.append(int(logits.argmax()))
        margins.append(float(first - second))
        logits = session.decode(found[-1])
    session.close()
    return found, min(margins)


@pytest.mark.parametrize(
    ("scheme", "operator"),
    [(QuantScheme(4, group_size=32), QMOE), (QuantScheme(4, group_size=32, symmetric=False), LOOP)],
)
def test_experts(
    node_modules: Path, reference_folder: Path, tmp_path: Path, scheme: QuantScheme, operator: str
) -> None:
    source = tiny_with_tokenizer(tmp_path / "source", reference_folder, tiny_moe_config(moe_intermediate_size=64))
    checkpoint = round_to_nearest(source, tmp_path / "quantized", ("*", scheme))
    result = export_onnx(checkpoint, tmp_path / "model", target="web")
    assert [item["operator"] for item in result["expert_layers"]] == [operator]
    command = ["node", "greedy.mjs", str(tmp_path / "model"), json.dumps(PROMPTS), str(NEW)]
    answer = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, check=True, timeout=120)
    tokenizer = ModelTokenizer(tmp_path / "model")
    for prompt, found in zip(PROMPTS, json.loads(answer.stdout)["alone"], strict=True):
        check(tmp_path / "model", tokenizer, prompt, found)


def test_greedy_text_is_our_sessions(node_modules: Path, folder: Path) -> None:
    command = ["node", "greedy.mjs", str(folder), json.dumps(PROMPTS), str(NEW)]
    answer = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, check=True, timeout=120)
    result, tokenizer = json.loads(answer.stdout), ModelTokenizer(folder)
    for prompt, alone, together in zip(PROMPTS, result["alone"], result["batch"], strict=True):
        check(folder, tokenizer, prompt, alone)
        check(folder, tokenizer, prompt, together)


def test_text_without_ties_is_the_same(node_modules: Path, folder: Path) -> None:
    """Token by token, in prompts where no two tokens are close at any step."""
    tokenizer = ModelTokenizer(folder)
    answers = {prompt: greedy_text(folder, tokenizer, prompt) for prompt in CLEAR}
    clear = {prompt: wanted for prompt, (wanted, margin) in answers.items() if margin > TIE}
    assert len(clear) >= 2, answers
    command = ["node", "greedy.mjs", str(folder), json.dumps([*clear]), str(NEW)]
    answer = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(answer.stdout)
    for wanted, text, *rows in zip(clear.values(), result["text"], result["alone"], result["batch"], strict=True):
        assert [row[: len(wanted)] for row in rows] == [wanted, wanted]
        assert text == tokenizer.decode(wanted)


def test_the_cards_script_runs(node_modules: Path, folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "library_name: transformers.js" in card
    assert "onnxruntime_genai" not in card
    script = card.partition("```javascript\n")[2].partition("```")[0].replace("NAME-OF-THIS-FOLDER", folder.name)
    *lines, last = script.replace('".."', json.dumps(str(folder.parent))).strip().splitlines()
    text = "\n".join([*lines, f"console.log(JSON.stringify({last.removesuffix(';')}));"])
    (node_modules / f"{tmp_path.name}.mjs").write_text(text.replace("100", "8"))
    command = ["node", f"{tmp_path.name}.mjs"]
    answer = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(answer.stdout.splitlines()[-1])[0]["generated_text"][-1]["role"] == "assistant"


def test_files_and_configuration_are_transformers_js_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    files = {path.name for path in (folder / "onnx").iterdir()}
    data = {"model_q4f16.onnx_data", "model_q4f16.onnx_data_1", "model_q4f16.onnx_data_2"}
    assert files == {"model_q4f16.onnx"} | data
    assert "quantization_config" not in config
    assert config["transformers.js_config"] == {
        "dtype": "q4f16",
        "kv_cache_dtype": {"q4f16": "float16"},
        "use_external_data_format": {"model_q4f16.onnx": 3},
    }


def test_what_browsers_have_no_fast_kernels_for_is_said(quantized: Any, tmp_path: Path) -> None:
    class Told(Progress):
        said: list[str] = []  # noqa: RUF012

        def warn(self, text: str) -> None:
            self.said.append(text)

    for recipe in ("edge-w4", "gptq-w4a16-g128"):
        export_onnx(open_source(str(quantized(recipe))), tmp_path / recipe, target="web", progress=Told())
    [said] = Told.said
    assert "q_proj is w4-g128-sym: WebGPU's fast kernels are for symmetric 4-bit groups of 32" in said
    export_onnx(open_source(str(quantized("gptq-w4a16-g128"))), tmp_path / "cpu", progress=Told())
    assert len(Told.said) == 1


def test_what_transformers_js_cannot_load_is_refused(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_export.ship.onnx.MOST_WEB_SHARDS", 10)
    checkpoint = open_source(str(quantized("edge-w4")))
    with pytest.raises(InputError, match="ONNX Runtime's operators"):
        export_onnx(checkpoint, tmp_path / "out", "standard", target="web")
    with pytest.raises(UnsupportedError, match="bf16: transformers\\.js has fp16 and fp32"):
        export_onnx(checkpoint, tmp_path / "out", precision="bf16", target="web")
    with pytest.raises(UnsupportedError, match="75 data files, transformers\\.js reads 10"):
        export_onnx(checkpoint, tmp_path / "out", target="web", max_shard_size=4096)
    assert not (tmp_path / "out").exists()
