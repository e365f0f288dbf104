"""Chat prompts as llama.cpp's own server makes them of our GGUF files: the text and the tokens of transformers."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xllamacpp
from transformers import AutoTokenizer

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.text.tokenizer import ModelTokenizer, chat_text
from tests.artifact.support import THREADS
from tests.reference.test_chats import AGAIN, CALL, INLINE, QUESTION, RESULT, SYSTEM, TOOL

# llama.cpp's server continues an answer that stands last, where transformers begins a new one: none ends so.
CHATS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [QUESTION]},
    "after a thought": {"messages": [SYSTEM, QUESTION, INLINE, AGAIN]},
    "after a tool": {
        "messages": [SYSTEM, QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
        "tools": [TOOL, TOOL],
    },
}
TEMPLATES = ["the reference model's", "the published"]


class Served:
    """A file in llama.cpp's server, and the folder it was written from."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self.path = folder, path
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
        parameters.cpuparams.n_threads = THREADS
        self._server = xllamacpp.Server(parameters)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        address, headers = f"{self._server.listening_address}/{path}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Callable[[str], Served]:
    """`served(template)`: the reference model with that chat template, each started once."""
    base, made = tmp_path_factory.mktemp("chat"), dict[str, Served]()

    def get(template: str) -> Served:
        if template not in made:
            folder, path = base / str(len(made)), base / f"{len(made)}.gguf"
            shutil.copytree(reference_folder, folder)
            if template == "the published":
                published = Path(__file__).parents[1] / "reference" / "qwen3_chat_template.jinja"
                shutil.copyfile(published, folder / "chat_template.jinja")
            export_gguf(open_checkpoint(folder), path, "q4_k_m")
            made[template] = Served(folder, path)
        return made[template]

    return get


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "not thinking"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_template_in_both_modes(
    served: Callable[[str], Served], template: str, chat: dict[str, Any], thinking: bool
) -> None:
    """Rendered by llama.cpp's Jinja and by transformers, and by us from the file and from the folder."""
    model, messages, tools = served(template), chat["messages"], chat.get("tools")
    request = {**chat, "chat_template_kwargs": {"enable_thinking": thinking}}
    text = model.post("apply-template", request)["prompt"]
    theirs = AutoTokenizer.from_pretrained(model.folder)
    options = {"tools": tools, "add_generation_prompt": True, "enable_thinking": thinking}
    assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
    assert text.endswith("assistant\n" if thinking else "assistant\n<think>\n\n</think>\n\n")
    tokens = model.post("tokenize", {"content": text, "parse_special": True})["tokens"]
    assert tokens == theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    session = open_session(model.path)
    for ours in (tokenizer_of(model.path, session), ModelTokenizer(model.folder)):
        assert chat_text(ours, messages, True, thinking, tools) == text
        np.testing.assert_array_equal(ours.encode(text), tokens)
    session.close()


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "not thinking"])
def test_a_chat_is_answered_after_that_prompt(served: Callable[[str], Served], thinking: bool) -> None:
    model, messages = served("the published"), [SYSTEM, QUESTION]
    kwargs = {"enable_thinking": thinking}
    answer = model.post("v1/chat/completions", {"messages": messages, "chat_template_kwargs": kwargs, "max_tokens": 1})
    wanted = ModelTokenizer(model.folder)
    count = len(wanted.encode(chat_text(wanted, messages, True, thinking)))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (count, 1)
