"""onnxruntime-genai runs our ONNX folders as they are: its tokenizer, chat template and greedy text are compared
with tokenizer.json, our renderer and our own ONNX Runtime session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions, greedy
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.text.tokenizer import ModelTokenizer, render_chat
from tests.artifact.support import THREADS
from tests.conftest import tiny_config

PROMPTS = [
    "The quick brown fox",
    "def add(a, b):\n    ",
    "长城是",
    "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 24
FOLDERS = [
    ("original", {}),
    ("original", {"precision": "fp16"}),
    ("gptq-w4a16-g128", {}),
    ("gptq-w4a16-g32-asym", {}),
    ("gptq-w4a16-g128-head8", {}),
    ("rtn-w8a16", {}),
]


def genai_greedy(model: genai.Model, ids: NDArray, **options: Any) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, **options)
    generator, tokens = genai.Generator(model, parameters), []
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize(("name", "options"), FOLDERS, ids=lambda value: value if isinstance(value, str) else None)
def test_greedy_text_is_our_sessions(
    onnx_folder: Callable, tokenizer: ModelTokenizer, name: str, options: dict[str, str]
) -> None:
    folder = onnx_folder(name, **options).path
    model, session = genai.Model(str(folder)), open_session(folder, RuntimeOptions(threads=THREADS))
    stops = tokenizer.stop_ids()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        ours = greedy(session, ids, NEW_TOKENS).tolist()
        end = next((i + 1 for i, token in enumerate(ours) if token in stops), NEW_TOKENS)
        for shared_cache in (True, False):
            options = {"max_length": len(ids) + NEW_TOKENS, "past_present_share_buffer": shared_cache}
            assert genai_greedy(model, ids, **options) == ours[:end], prompt
    session.close()


def test_a_chat_ends_at_a_stop_token(onnx_folder: Callable, tokenizer: ModelTokenizer) -> None:
    """With the folder's own settings: the reference model answers small sums, and its eos ids end the text."""
    model = genai.Model(str(onnx_folder("original").path))
    tokens = genai_greedy(model, tokenizer.encode(PROMPTS[-1]))
    assert tokens[-1] in tokenizer.stop_ids()
    assert 3 < len(tokens) < NEW_TOKENS


def test_settings(onnx_folder: Callable) -> None:
    exported = onnx_folder("gptq-w4a16-g128")
    settings = json.loads((exported.path / "genai_config.json").read_text())
    model, decoder, search = settings["model"], settings["model"]["decoder"], settings["search"]
    assert (model["context_length"], model["vocab_size"]) == (2048, 8192)
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ([8187, 8185], 8185, 8185)
    marks = [model[f"{name}_token_id"] for name in ("bot", "eot", "bor", "eor")]
    assert marks == [8190, 8191, 8188, 8189], "as onnxruntime-genai's own builder finds them"
    assert (decoder["num_hidden_layers"], decoder["head_size"], decoder["hidden_size"]) == (6, 128, 256)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    wanted = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert {key: search[key] for key in wanted} == wanted
    assert search["max_length"] == 2048


def test_a_long_context_does_not_reserve_its_whole_cache(make_checkpoint: Callable, tmp_path: Path) -> None:
    """genai allocates the cache of `max_length` before it starts: 9 GB for Qwen3-0.6B at 40,960 positions."""
    export_onnx(open_checkpoint(make_checkpoint(tiny_config(max_position_embeddings=40960))), tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert settings["model"]["context_length"] == 40960
    assert settings["search"]["max_length"] == 4096


def test_tokenizer_and_chat_template(onnx_folder: Callable, tokenizer: ModelTokenizer, reference_folder: Path) -> None:
    theirs = genai.Tokenizer(genai.Model(str(onnx_folder("gptq-w4a16-g128").path)))
    for prompt in PROMPTS:
        np.testing.assert_array_equal(theirs.encode(prompt), tokenizer.encode(prompt))
    messages = '[{"role": "user", "content": "Hello"}]'
    rendered = theirs.apply_chat_template(messages=messages, add_generation_prompt=True)
    assert rendered == render_chat(tokenizer.template, [{"role": "user", "content": "Hello"}], generate=True)
