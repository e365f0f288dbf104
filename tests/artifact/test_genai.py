"""onnxruntime-genai runs our ONNX folders as they are: its tokenizer, chat template and greedy text are compared
with tokenizer.json, our renderer and our own ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
from numpy.typing import NDArray

from qwen3_export.run.session import RuntimeOptions, greedy, open_session
from qwen3_export.text import ModelTokenizer, render_chat
from tests.artifact.support import THREADS

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
    ("rtn-w8a16", {}),
]


def genai_greedy(model: genai.Model, ids: NDArray, shared_cache: bool) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(
        do_sample=False, max_length=len(ids) + NEW_TOKENS, past_present_share_buffer=shared_cache
    )
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
            assert genai_greedy(model, ids, shared_cache) == ours[:end], prompt
    session.close()


def test_a_chat_ends_at_a_stop_token(onnx_folder: Callable, tokenizer: ModelTokenizer) -> None:
    """The reference model answers small sums and stops; without eos ids in genai_config.json it would not."""
    model = genai.Model(str(onnx_folder("original").path))
    tokens = genai_greedy(model, tokenizer.encode(PROMPTS[-1]), shared_cache=True)
    assert tokens[-1] in tokenizer.stop_ids()
    assert len(tokens) < NEW_TOKENS


def test_tokenizer_and_chat_template(onnx_folder: Callable, tokenizer: ModelTokenizer, reference_folder: Path) -> None:
    theirs = genai.Tokenizer(genai.Model(str(onnx_folder("gptq-w4a16-g128").path)))
    for prompt in PROMPTS:
        np.testing.assert_array_equal(theirs.encode(prompt), tokenizer.encode(prompt))
    messages = '[{"role": "user", "content": "Hello"}]'
    rendered = theirs.apply_chat_template(messages=messages, add_generation_prompt=True)
    assert rendered == render_chat(tokenizer.template, [{"role": "user", "content": "Hello"}], generate=True)
